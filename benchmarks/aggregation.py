"""What turning hits into labels costs, beside the search before it: 1.3 million labels, 200 neighbours, batch 256.

The memory is the `ivf-pq` one that `memory_scale` leaves, whose search is the faster; where it is not there yet, that
benchmark is run first. Merging the shards' answers is part of the search here. The aggregation has one thread.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("RAEXMC_NUM_CPUS", "2")

import _command  # noqa: F401  # for what it does, before NumPy is there
import memory_scale
import numpy as np
from _result import below, print_targets, write_result
from _scale import FOLDER, INSTANCES, KEYS, SHARDS, THREADS, cluster_centres, vectors

from raexmc_ray.cluster import connected
from raexmc_ray.files import Folder
from raexmc_ray.memory.pool import ShardPool
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.predict import aggregate
from raexmc_ray.recipe import Neighbours

B, NEIGHBOURS, ROUNDS, K = 256, 200, 7, 100


def main() -> None:
    memory = Folder.at(FOLDER / "ivf-pq")
    if (memory / "CURRENT").size() is None:
        memory_scale.main([])
    queries_BD = vectors(np.random.default_rng(4), cluster_centres(), B)
    searches, aggregations = [], []
    with connected(), ShardPool(memory, open_snapshot(memory), cpus=THREADS / SHARDS) as pool:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            hits = pool.search(queries_BD, Neighbours(joint=NEIGHBOURS))
            searched = time.perf_counter()
            aggregate(hits, lambda_=0.5, temperature=0.05, k=K)
            searches.append(searched - started)
            aggregations.append(time.perf_counter() - searched)
    search, aggregation = (1000 * float(np.median(seconds)) for seconds in (searches, aggregations))
    figures = {
        "labels": KEYS - INSTANCES,
        "batch": B,
        "neighbours": NEIGHBOURS,
        "votes": len(hits.votes),
        "search_ms": round(search, 1),
        "aggregate_ms": round(aggregation, 1),
    }
    targets = [below("aggregation / search", aggregation / search, 0.1)]
    write_result("aggregation", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    main()
