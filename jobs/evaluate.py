"""`raexmc evaluate` as a Ray job: `ray job submit --working-dir . -- python jobs/evaluate.py --help`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["evaluate", *sys.argv[1:]])
