"""Labelling whole data sets offline, with Ray."""
