"""`raexmc build` as a Ray job: `ray job submit --working-dir . -- python jobs/build.py --help`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["build", *sys.argv[1:]])
