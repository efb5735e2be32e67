"""`raexmc embed` as a Ray job: `ray job submit --working-dir . -- python jobs/embed.py --help`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["embed", *sys.argv[1:]])
