"""`raexmc score` as a Ray job: `ray job submit --working-dir . -- python jobs/score.py --help`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["score", *sys.argv[1:]])
