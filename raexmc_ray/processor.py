"""What some processors need to be told before NumPy is imported."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

FEATURES = "NPY_DISABLE_CPU_FEATURES"
"""Environment variable that NumPy reads where it is imported."""


def avoid_slow_sort(cpu_info: Path = Path("/proc/cpuinfo")) -> None:
    """Have NumPy sort by AVX2 on AMD's Zen 4, in this process and those that it starts: a third of the time.

    NumPy sorts by AVX-512 where there is one, and by an instruction that Zen 4 has in microcode only
    (numpy/x86-simd-sort#6); Zen 5 does not, nor Intel. What the environment says already stands. It is too late where
    NumPy is imported: then nothing is done.
    """
    if "numpy" in sys.modules or not cpu_info.exists():
        return
    first, _, _ = cpu_info.read_text().partition("\n\n")
    zen_3_or_4 = "AuthenticAMD" in first and re.search(r"^cpu family\s*: 25$", first, re.MULTILINE)
    if zen_3_or_4 and "avx512f" in first:  # which Zen 3 has not
        os.environ.setdefault(FEATURES, "X86_V4")
