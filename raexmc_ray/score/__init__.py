"""Labelling whole data sets offline: `run.score` does it with Ray, `job` says what is on disk."""
