"""What the benchmarks at the size of LF-AmazonTitles-1.3M share: 3.55 million synthetic keys with their labels.

The vectors are 20,000 clusters of very different sizes around 500 topics, on the unit sphere. RAEXMC_KEYS makes it
smaller, to try a benchmark.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus, Split
from raexmc_ray.corpus.types import text_table
from raexmc_ray.embed import Embeddings
from raexmc_ray.files import FileEntry, Folder, describe_file
from raexmc_ray.memory.snapshot import TRAINED, Manifest, publish
from raexmc_ray.memory.write import SEGMENT, SnapshotPlan, key_table
from raexmc_ray.recipe import PredictionSection

KEYS = int(os.environ.get("RAEXMC_KEYS", 3_550_000))
INSTANCES = KEYS * 225 // 355
LABELS_PER_INSTANCE = 22
DIMENSION, SHARDS, CLUSTERS, TOPICS, THREADS = 768, 8, 20_000, 500, 2
FOLDER = Path("runs/memory_scale")


def vectors(rng: np.random.Generator, centres: np.ndarray, rows: int) -> np.ndarray:
    """float32 [rows, d] of unit length: clusters whose sizes fall as 1/√rank, with as much noise as signal."""
    places = (len(centres) * rng.random(rows) ** 2).astype(np.int64)
    block = centres[places] + rng.standard_normal((rows, DIMENSION), np.float32) / np.float32(DIMENSION**0.5)
    return block / np.linalg.norm(block, axis=1, keepdims=True)


def cluster_centres() -> np.ndarray:
    """float32 [CLUSTERS, d], of about unit length."""
    rng = np.random.default_rng(0)
    topics, own = (rng.standard_normal((rows, DIMENSION), np.float32) for rows in (TOPICS, CLUSTERS))
    return (topics[rng.integers(TOPICS, size=CLUSTERS)] + own) / np.float32((2 * DIMENSION) ** 0.5)


def write_embeddings(centres: np.ndarray) -> Embeddings:
    """Float16 embeddings of all keys, as Ray Data's actors write them."""
    embeddings = Embeddings(Folder.at(FOLDER / f"embeddings-{KEYS}"), KEYS, SHARDS, "float16")
    for unit in embeddings.missing():
        embeddings.write(unit, vectors(np.random.default_rng([1, unit]), centres, embeddings.size(unit)))
    return embeddings


def scale_table() -> pa.Table:
    """Keys with texts and labels of a real size, as `key_table` gives them."""
    labels = KEYS - INSTANCES
    targets = np.random.default_rng(2).integers(labels, size=INSTANCES * LABELS_PER_INSTANCE, dtype=np.int32)
    ends = np.arange(INSTANCES + 1) * LABELS_PER_INSTANCE
    relevance = sp.csr_matrix((np.ones(len(targets), np.float32), targets, ends), shape=(INSTANCES, labels))
    title = "the title of product {}, of fifty or sixty letters"
    instances, names = (
        text_table([f"{kind}{i:09d}" for i in range(rows)], [title.format(i) for i in range(rows)])
        for kind, rows in (("X", INSTANCES), ("Z", labels))
    )
    nothing = np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(INSTANCES + 1, np.int64)
    train = Split(instances, relevance, sp.csr_matrix(nothing, shape=relevance.shape))
    return key_table(Corpus(train, train, names))


def publish_scale(plan: SnapshotPlan, trained: bytes, files: dict[str, FileEntry]) -> None:
    """Make the shards a snapshot; it has no encoder and no labels' texts."""
    path = f"segments/{SEGMENT}/{TRAINED}"
    (plan.folder / path).write(trained)
    files[path] = describe_file(Path((plan.folder / path).path))
    manifest = Manifest(
        id=plan.id,
        created="",
        instances=INSTANCES,
        labels=KEYS - INSTANCES,
        dimension=DIMENSION,
        shards=SHARDS,
        index=plan.index,
        segments=[SEGMENT],
        encoder_fingerprint="none",
        defaults=PredictionSection(),
        files=files,
    )
    publish(plan.memory, manifest)
