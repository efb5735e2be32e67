"""Import it first: a benchmark's processes are then set up as those of the command `raexmc` are."""

from raexmc_ray.processor import avoid_slow_sort

avoid_slow_sort()
