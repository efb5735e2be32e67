"""A memory of 3.55 million keys of 768 numbers, the size of LF-AmazonTitles-1.3M, in eight shard actors on one
machine: built in bounded memory, and searched beside one FAISS index of the same kind, threads and vectors.

The vectors are synthetic (see `_scale.py`); queries come from the same clusters. The single index is made by
FAISS itself of the same trained quantiser and the same keys; both look into the same number of lists: the default's,
and then the fewest with which these vectors reach the recall, where there is next to nothing to search in a list, and
what the calls between processes take counts most. Kinds of index that are named are measured alone; each figure tells
the commit that it is of.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAEXMC_NUM_CPUS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `raexmc evaluate` has it (cluster.SLEEP_WHEN_IDLE)

import _command  # noqa: F401  # for what it does, before NumPy is there
import faiss
import numpy as np
import psutil
import pyarrow as pa
import ray
from _result import RESULTS, at_least, below, commit, print_targets, write_result
from _scale import (
    DIMENSION,
    FOLDER,
    KEYS,
    SHARDS,
    THREADS,
    cluster_centres,
    publish_scale,
    scale_table,
    vectors,
    write_embeddings,
)

from raexmc_ray.cluster import connected
from raexmc_ray.embed import UNIT_KEYS, Embeddings
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import write_shards
from raexmc_ray.memory.index import CoarseQuantizer, ShardIndex
from raexmc_ray.memory.kinds import IndexSpec
from raexmc_ray.memory.plan import shard_bytes
from raexmc_ray.memory.pool import ShardPool
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.memory.write import SEGMENT, SnapshotPlan
from raexmc_ray.recipe import MemorySection, Neighbours

_faiss: Any = faiss
B, NEIGHBOURS, BATCHES, ROUNDS, SINGLES = 256, 100, 5, 6, 60
KINDS = "ivf-fp16", "ivf-pq"
PROBES = (4, 8, 16, 32, 64, 128, 256)
RECALL, RESTARTS = 0.95, 5
K_FACTOR = 8.8
"""Keys that FAISS's IndexRefine rescores for each that is wanted: as many as eight shards do together, each of them 110
for the best 100 (its share of 600, and four standard deviations more)."""


class PeakMemory(threading.Thread):
    """The most private memory that processes which work on `name` had at a time: of one, and of all together."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self._name, self._ended, self.one, self.all = name, threading.Event(), 0, 0

    def run(self) -> None:
        while not self._ended.wait(0.2):
            sizes = [self._private(process) for process in psutil.Process().children(recursive=True)]
            self.one, self.all = max(self.one, *sizes, 0), max(self.all, sum(sizes))

    def _private(self, process: psutil.Process) -> int:
        try:
            return int(process.memory_full_info().uss) if self._name in " ".join(process.cmdline()) else 0
        except psutil.Error:
            return 0

    def stop(self) -> None:
        self._ended.set()
        self.join()


def exact(embeddings: Embeddings, queries_BD: np.ndarray) -> np.ndarray:
    """int64 [B, NEIGHBOURS]: ids of the nearest keys, by comparing all."""
    heap = _faiss.ResultHeap(len(queries_BD), NEIGHBOURS, keep_max=True)
    for shard in range(SHARDS):
        start = 0
        for block_ND in embeddings.of_shard(shard):
            ids = shard + SHARDS * (start + np.arange(len(block_ND)))
            block = block_ND.astype(np.float32)
            scores, found = faiss.knn(queries_BD, block, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(scores, ids[found])
            start += len(block_ND)
    heap.finalize()
    return heap.I


def recall(found_Bb: np.ndarray, exact_Bb: np.ndarray) -> float:
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact_Bb, found_Bb, strict=True)]))


def rates(searches: dict[str, Callable[[np.ndarray], Any]], queries_BD: np.ndarray) -> dict[str, dict[str, float]]:
    """{"queries_per_s" at batch B, "p50_ms" at batch 1} of each, the medians of calls that take turns, after a round
    that is not counted."""
    batched: dict[str, list[float]] = {name: [] for name in searches}
    singles: dict[str, list[float]] = {name: [] for name in searches}
    for number in range(-BATCHES, ROUNDS * BATCHES):
        first = number % BATCHES * B
        for name, search in searches.items():
            started = time.perf_counter()
            search(queries_BD[first : first + B])
            if number >= 0:
                batched[name].append(time.perf_counter() - started)
    for name, search in searches.items():
        for query in range(SINGLES):
            started = time.perf_counter()
            search(queries_BD[query : query + 1])
            singles[name].append(time.perf_counter() - started)
    return {
        name: {
            "queries_per_s": round(B / float(np.median(batched[name])), 1),
            "p50_ms": round(1000 * float(np.median(singles[name])), 2),
        }
        for name in searches
    }


def read_once(plan: SnapshotPlan) -> None:
    """Bring the shards' files into the page cache: what is measured is the search, not a disk."""
    for folder in shard_folders(plan):
        for path in folder.iterdir():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def single_index(plan: SnapshotPlan, trained: bytes, embeddings: Embeddings) -> Any:
    """One FAISS index with what all shards have: its ids are those of the first shard's keys, then the second's …."""
    index: Any = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
    for shard in range(SHARDS):
        for block_ND in embeddings.of_shard(shard):
            index.add(block_ND.astype(np.float32))
    if not plan.index.has_vectors:
        return index
    keys: Any = faiss.IndexScalarQuantizer(DIMENSION, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    keys.is_trained = True
    codes: Any = keys.codes
    codes.resize(KEYS * keys.code_size)
    view = faiss.rev_swig_ptr(codes.data(), KEYS * keys.code_size).reshape(KEYS, -1)
    start = 0
    for shard in range(SHARDS):
        for block_ND in embeddings.of_shard(shard):
            view[start : start + len(block_ND)] = block_ND.astype(np.float16).view(np.uint8)
            start += len(block_ND)
    keys.ntotal = KEYS
    refined = faiss.IndexRefine(index, keys)
    refined.k_factor = K_FACTOR
    refined.own_fields = refined.own_refine_index = True
    index.this.disown()
    keys.this.disown()
    return refined


def keys_of(shard: int) -> int:
    """Keys of a shard."""
    return len(range(shard, KEYS, SHARDS))


def shard_folders(plan: SnapshotPlan) -> Iterator[Path]:
    for shard in range(SHARDS):
        yield Path(plan.folder.path) / f"segments/{SEGMENT}/shard-{shard:04d}"


def choose_probes(plan: SnapshotPlan, trained: bytes, queries_BD: np.ndarray, exact_Bb: np.ndarray) -> int:
    """The fewest lists that reach the recall, with a little to spare, on queries that are not measured later."""
    faiss.omp_set_num_threads(THREADS)
    index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
    shards = [ShardIndex(folder, plan.index, SHARDS) for folder in shard_folders(plan)]
    for probes in PROBES:
        lists = CoarseQuantizer(index, probes).assign(queries_BD)
        parts = [shard.search(queries_BD, NEIGHBOURS, 0, len(shard), lists) for shard in shards]
        ids = np.concatenate([np.where(p >= 0, s + SHARDS * p, -1) for s, (p, _) in enumerate(parts)], axis=1)
        order = np.argsort(-np.concatenate([scores for _, scores in parts], axis=1), axis=1)[:, :NEIGHBOURS]
        reached = recall(np.take_along_axis(ids, order, 1), exact_Bb)
        print(f"  {probes} lists: recall {reached:.4f}", flush=True)
        if reached >= RECALL + 0.005:
            break
    return probes


def measure(
    kind: str, embeddings: Embeddings, table: pa.Table, queries_BD: np.ndarray, exact_Bb: np.ndarray
) -> dict[str, Any]:
    """Build, search, and search the single index."""
    spec = IndexSpec.of(MemorySection(index=kind), KEYS, DIMENSION)
    memory = FOLDER / kind
    shutil.rmtree(memory, ignore_errors=True)
    plan = SnapshotPlan(Folder.at(memory), "scale", SHARDS, spec)
    peak = PeakMemory("_write_shard")
    peak.start()
    started = time.perf_counter()
    trained, entries = write_shards(plan, table, embeddings, THREADS)
    build_s = time.perf_counter() - started
    peak.stop()
    files = {name: entry for part in entries for name, entry in part.items()}
    index_bytes = sum(entry.size for name, entry in files.items() if name.endswith(spec.files))
    half = len(queries_BD) - B
    publish_scale(plan, trained, files)
    fewest = choose_probes(plan, trained, queries_BD[half:], exact_Bb[half:])
    faiss.omp_set_num_threads(THREADS)
    index = single_index(plan, trained, embeddings)
    read_once(plan)
    at_default, at_fewest = (
        beside_single(plan, index, probes, queries_BD[:half], exact_Bb[:half]) for probes in (spec.probes, fewest)
    )
    with ShardPool(plan.memory, open_snapshot(plan.memory), cpus=THREADS / SHARDS) as pool:
        restart_s = restart(lambda: pool.search(queries_BD[:1], Neighbours(joint=NEIGHBOURS)), pool.actors[0])
        nothing = Nothing.remote()  # type: ignore[attr-defined]  # ray.remote's
        nothing_s = restart(lambda: ray.get(nothing.pid.remote()), nothing)
    planned = SHARDS * shard_bytes(spec, -(-KEYS // SHARDS))
    return {
        "lists": spec.lists, "build_s": round(build_s, 1),
        "restart_s": round(restart_s, 2), "restart_of_an_empty_actor_s": round(nothing_s, 2),
        "index_bytes": index_bytes, "planned_bytes": planned,
        "peak_of_one_writer_bytes": peak.one, "peak_of_all_writers_bytes": peak.all,
        "default probes": at_default, "fewest probes": at_fewest,
    }  # fmt: skip


def beside_single(
    plan: SnapshotPlan, index: Any, probes: int, queries_BD: np.ndarray, exact_Bb: np.ndarray
) -> dict[str, Any]:
    """Recall and rates of the shards and of the single index, where both look into so many lists."""
    _faiss.ParameterSpace().set_index_parameter(index, "nprobe", probes)
    neighbours = Neighbours(joint=NEIGHBOURS)
    starts = np.cumsum([0] + [keys_of(shard) for shard in range(SHARDS)])
    places = np.concatenate([index.search(queries_BD[i : i + B], NEIGHBOURS)[1] for i in range(0, len(queries_BD), B)])
    shard = np.searchsorted(starts, places, side="right") - 1
    ids = np.where(places >= 0, shard + SHARDS * (places - starts[shard]), -1)
    snapshot = open_snapshot(plan.memory)
    spec = snapshot.manifest.index.model_copy(update={"probes": probes})
    snapshot = replace(snapshot, manifest=snapshot.manifest.model_copy(update={"index": spec}))
    started = time.perf_counter()
    with ShardPool(plan.memory, snapshot, cpus=THREADS / SHARDS) as pool:
        open_s = time.perf_counter() - started
        found = [pool.search(queries_BD[i : i + B], neighbours).key_ids_Bb for i in range(0, len(queries_BD), B)]
        searches = {"sharded": lambda q: pool.search(q, neighbours), "single": lambda q: index.search(q, NEIGHBOURS)}
        measured = rates(searches, queries_BD)
    return {
        "probes": probes,
        "open_s": round(open_s, 2),
        "sharded": {"recall": round(recall(np.concatenate(found), exact_Bb), 4), **measured["sharded"]},
        "single": {"recall": round(recall(ids, exact_Bb), 4), **measured["single"]},
        "queries_per_s_ratio": round(measured["sharded"]["queries_per_s"] / measured["single"]["queries_per_s"], 3),
    }


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Nothing:
    """An actor that does nothing: what Ray itself takes to bring one back."""

    def pid(self) -> int:
        return os.getpid()


def restart(ask: Callable[[], Any], actor: Any) -> float:
    """Seconds from the kill of an actor's process to the next answer of `ask`, which needs it, less those of an answer:
    the median of a few kills."""
    ask()
    taken = []
    for _ in range(RESTARTS):
        started = time.perf_counter()
        ask()
        usual = time.perf_counter() - started
        os.kill(ray.get(actor.pid.remote()), 9)
        started = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - started - usual)
    return float(np.median(taken))


def main(names: Sequence[str]) -> None:
    """names: the kinds to measure, all where there are none; the others stay as they were written."""
    if unknown := sorted(set(names) - set(KINDS)):
        raise SystemExit(f"{unknown} are none of {list(KINDS)}")
    figures: dict[str, Any] = json.loads((RESULTS / "memory_scale.json").read_text())["figures"] if names else {}
    figures |= {"keys": KEYS, "dimension": DIMENSION, "shards": SHARDS, "threads": THREADS}
    centres = cluster_centres()
    embeddings, table = write_embeddings(centres), scale_table()
    print(f"{KEYS:,} keys written in units of {UNIT_KEYS:,}", flush=True)
    queries_BD = vectors(np.random.default_rng(3), centres, (BATCHES + 1) * B)
    exact_Bb = exact(embeddings, queries_BD)
    print("exact neighbours found", flush=True)
    for kind in names or KINDS:
        with connected():
            figures[kind] = {**measure(kind, embeddings, table, queries_BD, exact_Bb), "commit": commit()}
        print(kind, figures[kind], flush=True)
    targets = [target for kind in KINDS for target in targets_of(kind, figures[kind])]
    write_result("memory_scale", figures, targets)
    print_targets({}, targets)


def targets_of(kind: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What `measure` has of a kind, beside what it must reach."""
    block = 16 * UNIT_KEYS * DIMENSION * 4 / SHARDS
    peak, limit = measured["peak_of_all_writers_bytes"], 1.3 * measured["index_bytes"] + block
    planned = abs(measured["planned_bytes"] / measured["index_bytes"] - 1)
    targets = []
    for lists in ("default probes", "fewest probes"):
        sharded, ratio = measured[lists]["sharded"], measured[lists]["queries_per_s_ratio"]
        searched = f"{kind}, {measured[lists]['probes']} lists"
        targets += [
            at_least(f"{searched}: recall@100 of the shards", sharded["recall"], RECALL),
            at_least(f"{searched}: queries/s at batch {B}, shards / single index", ratio, 0.85),
        ]
    return [
        *targets,
        below(f"{kind}: GiB of all writers", peak / 2**30, limit / 2**30),
        below(f"{kind}: planned bytes are off by", planned, 0.15),
        below(f"{kind}: seconds until a killed shard answers", measured["restart_s"], 1.0),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
