"""`raexmc train` as a Ray job: `ray job submit --working-dir . -- python jobs/train.py --help`."""

from raexmc_ray.cli import app

if __name__ == "__main__":
    import sys

    app(["train", *sys.argv[1:]])
