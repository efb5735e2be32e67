"""`raexmc score` as a Ray job: `ray job submit --working-dir . -- python jobs/score.py --help`."""

from raexmc_ray.cli import app

if __name__ == "__main__":
    import sys

    app(["score", *sys.argv[1:]])
