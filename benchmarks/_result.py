"""What every benchmark writes: figures and targets, with the machine, the versions and the commit."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CODE = (":/", ":(exclude,top)benchmarks/results")
"""What a result follows from: not the results that were written before it."""
PACKAGES = ("ray", "torch", "transformers", "faiss-cpu", "numpy", "scipy", "pyarrow")


def write_result(name: str, figures: dict[str, Any], targets: list[dict[str, Any]]) -> Path:
    """Write results/NAME.json; each target is {"what", "figure", "target", "holds"}."""
    result = {
        "name": name,
        # A soak runs in pytest, whose own path on this machine says nothing.
        "command": "make soak" if "pytest" in sys.argv[0] else shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "commit": commit(),
        "figures": figures,
        "targets": targets,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def at_least(what: str, figure: float, target: float) -> dict[str, Any]:
    """A target that `figure` reaches or exceeds."""
    return {"what": what, "figure": round(figure, 4), "target": f">= {target}", "holds": figure >= target}


def below(what: str, figure: float, limit: float) -> dict[str, Any]:
    """A target that `figure` stays below."""
    return {"what": what, "figure": round(figure, 4), "target": f"< {limit:.4f}", "holds": figure < limit}


def print_targets(figures: dict[str, Any], targets: list[dict[str, Any]]) -> None:
    """Figures and verdicts, for people."""
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    for target in targets:
        verdict = "holds" if target["holds"] else "FALLS SHORT"
        print(f"{verdict:>12}  {target['what']}: {target['figure']} {target['target']}")


def commit() -> str:
    """The commit that is checked out; "-dirty" where the code differs from it."""
    return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno", "--", *CODE) else "")


def _machine() -> dict[str, Any]:
    cpu: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        cpu.setdefault(name.strip(), value.strip())
    model = cpu.get("model name", platform.processor())
    if {"cpu family", "model"} <= cpu.keys():  # clouds leave names as long as "AMD EPYC"
        model += f", family {cpu['cpu family']} model {cpu['model']}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpu": None}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
