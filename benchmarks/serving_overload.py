"""Five minutes at four times what the application sustains: it keeps answering at its best rate, refuses the rest at
once, grows no queue and no memory, and is itself again when the flood is over.

The flood is an open loop (requests come whether or not the ones before were answered), from a process of its own on
the same two cores. What it sustains is the better of the rates before the flood and after it: a machine that others
share is not as fast at all times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
from _result import at_least, below, print_targets, write_result
from _serving import FOLDER, HERE, PREDICT, load, memories, ours, server

SECONDS = int(os.environ.get("RAEXMC_SECONDS", "300"))
TIMES, CALLERS, SETTLED_S = 4, 64, 30
RECOVERED = 2.0
"""An answer is as fast as before when it takes at most so many times as long."""


def memory_of(url: str) -> int:
    """Private bytes of the processes that descend from this one."""
    sizes = []
    for process in psutil.Process().children(recursive=True):
        try:
            sizes.append(process.memory_full_info().uss)
        except psutil.Error:
            continue
    return sum(sizes)


def flood(url: str, rate: float, texts: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(what about every second brought, memory every ten of them)."""
    command = ["node", str(HERE / "_overload.mjs"), url, str(rate), str(SECONDS), str(texts)]
    seconds, sizes = [], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            seconds.append(json.loads(line))
            if len(seconds) % 10 == 0:
                sizes.append(memory_of(url))
                print(f"{len(seconds)} s: {line.strip()}, {sizes[-1] / 2**20:.0f} MiB", flush=True)
    return seconds, sizes


def latency(url: str, text: str) -> float:
    started = time.perf_counter()
    httpx.post(f"{url}{PREDICT}", json={"texts": [text]}, timeout=60).raise_for_status()
    return time.perf_counter() - started


def main() -> None:
    sharded, _, texts = memories()
    with server(*ours(sharded)) as url:
        load(url, texts, CALLERS, 10)
        usual = statistics.median(latency(url, text) for text in texts[:30])
        before = load(url, texts, CALLERS, 30)["texts_per_s"]
        print(f"sustained: {before} texts/s, an answer takes {1000 * usual:.1f} ms", flush=True)
        seconds, sizes = flood(url, TIMES * before, FOLDER / "texts.json")
        ended = time.perf_counter() - (seconds[-1]["at"] - SECONDS)  # after that none were sent; some waited on
        while True:
            recovered = time.perf_counter() - ended
            try:
                if latency(url, texts[0]) <= RECOVERED * usual or recovered > 60:
                    break
            except httpx.HTTPError:
                pass
        after = load(url, texts, CALLERS, 30)["texts_per_s"]
    # A busy sender's lines are more than a second apart: what counts is its clock.
    during = [second for second in seconds if second["at"] <= SECONDS + 1]
    lasted = during[-1]["at"]
    answered = sum(second["answered"]["count"] for second in during) / lasted
    refused = [second["refused"] for second in during if second["refused"]["count"]]
    number = sum(second["count"] for second in refused)
    figures = {
        "sustained_texts_per_s": {"before": before, "after": after},
        "sent_per_s": round(sum(second["sent"] for second in during) / lasted, 1),
        "answered_per_s": round(answered, 1),
        "refused_per_s": round(number / lasted, 1),
        "other": dict(sum((Counter(second["other"]) for second in seconds), Counter[str]())),
        "answered_p99_ms": round(statistics.median(s["answered"]["p99"] for s in during if s["answered"]["count"]), 1),
        "refused_p50_ms": round(statistics.median(second["p50"] for second in refused), 1),
        "refused_p99_ms": round(statistics.median(second["p99"] for second in refused), 1),
        "refused_p99_ms_of_the_worst_second": round(max(second["p99"] for second in refused), 1),
        "memory_mib": [round(size / 2**20) for size in sizes],
        "recovered_s": round(recovered, 2),
    }
    targets = [
        at_least("answered under the flood / sustained", answered / max(before, after), 0.9),
        below("refused, p99 (ms)", figures["refused_p99_ms"], 100),
        below("neither answered nor refused", sum(figures["other"].values()), 1),
        below("memory at the end / after half a minute", sizes[-1] / sizes[SETTLED_S // 10 - 1], 1.05),
        below("seconds until an answer is as fast as before", recovered, 10),
    ]
    write_result("serving_overload", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    main()
