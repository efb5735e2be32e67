"""Answers over HTTP at 64 callers and at one, beside a single process without Ray, and beside Ray Serve that does
nothing. The load comes from wrk, in a process of its own on the same two cores; rounds alternate, medians count.
"""

from __future__ import annotations

import statistics
from typing import Any

from _result import at_least, below, print_targets, write_result
from _serving import load, memories, nothing, ours, plain, server

CALLERS, ROUNDS, SECONDS = 64, 3, 15


def median(rounds: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}


def main() -> None:
    sharded, single, texts = memories()
    commands = {"ours": ours(sharded), "plain": plain(single), "nothing": nothing()}
    results: dict[str, dict[int, list[dict[str, Any]]]] = {name: {1: [], CALLERS: []} for name in commands}
    for number in range(ROUNDS):
        for name, command in commands.items():
            with server(*command) as url:
                load(url, texts, CALLERS, 5)  # not counted
                for callers in (CALLERS, 1):
                    results[name][callers].append(load(url, texts, callers, SECONDS))
                    print(f"round {number}, {name}, {callers} callers: {results[name][callers][-1]}", flush=True)
    figures = {
        name: {f"{callers} callers": median(rounds) for callers, rounds in found.items()}
        for name, found in results.items()
    }
    many, one = f"{CALLERS} callers", "1 callers"
    targets = [
        at_least(
            f"texts/s at {CALLERS} callers, ours / plain",
            figures["ours"][many]["texts_per_s"] / figures["plain"][many]["texts_per_s"],
            1.5,
        ),
        below(f"p99 at {CALLERS} callers (ms)", figures["ours"][many]["p99_ms"], figures["plain"][many]["p99_ms"]),
        below(
            "p50 at one caller (ms)",
            figures["ours"][one]["p50_ms"],
            figures["plain"][one]["p50_ms"] + figures["nothing"][one]["p50_ms"],
        ),
    ]
    write_result("serving_load", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    main()
