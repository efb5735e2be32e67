"""NumPy is kept from sorting by AVX-512 where that is slow: on Zen 4, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raexmc_ray.processor import FEATURES

CPU = """processor\t: 0
vendor_id\t: {}
cpu family\t: {}
flags\t\t: fpu avx2 {}

processor\t: 1
"""


def setting(tmp_path: Path, info: str, before: str = "pass", given: dict[str, str] | None = None) -> str:
    """The environment variable after the call, in a process that has not imported NumPy; or has, `before`."""
    (tmp_path / "cpuinfo").write_text(info)
    script = (
        f"{before}; from pathlib import Path; from raexmc_ray.processor import *; "
        f"avoid_slow_sort(Path({str(tmp_path / 'cpuinfo')!r})); print(os.environ.get(FEATURES, 'none'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != FEATURES} | (given or {})
    done = subprocess.run(
        [sys.executable, "-c", f"import os; {script}"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "wanted"),
    [
        ("AuthenticAMD", 25, "avx512f avx512_bf16", "X86_V4"),
        ("AuthenticAMD", 25, "", "none"),  # Zen 3
        ("AuthenticAMD", 26, "avx512f", "none"),  # Zen 5
        ("GenuineIntel", 6, "avx512f", "none"),
    ],
)
def test_on_zen_4_only(tmp_path: Path, vendor: str, family: int, flags: str, wanted: str) -> None:
    assert setting(tmp_path, CPU.format(vendor, family, flags)) == wanted


def test_what_is_set_stands_and_what_is_too_late_is_left(tmp_path: Path) -> None:
    zen_4 = CPU.format("AuthenticAMD", 25, "avx512f")
    assert setting(tmp_path, zen_4, given={FEATURES: "AVX512_ICL"}) == "AVX512_ICL"
    assert setting(tmp_path, zen_4, before="import numpy") == "none"


def test_the_command_is_in_time() -> None:
    script = "import raexmc_ray.cli, sys; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
