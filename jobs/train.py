"""`raexmc train` as a Ray job: `ray job submit --working-dir . -- python jobs/train.py --help`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["train", *sys.argv[1:]])
