"""`python -m raexmc_ray.cli`."""

from raexmc_ray.cli import main

if __name__ == "__main__":
    main()
