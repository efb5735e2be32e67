"""`raexmc evaluate` as a Ray job: `ray job submit --working-dir . -- python jobs/evaluate.py --help`."""

from raexmc_ray.cli import app

if __name__ == "__main__":
    import sys

    app(["evaluate", *sys.argv[1:]])
