"""`raexmc tune` as a Ray job: `ray job submit --working-dir . -- python jobs/tune.py --help`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["tune", *sys.argv[1:]])
