"""A container's CPUs are those that count, not the machine's."""

import os
import subprocess
import sys


def test_cpus_that_the_process_may_not_use_do_not_count() -> None:
    one = min(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); from raexmc_ray.cluster import usable_cpus as n; print(n())"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "1"
