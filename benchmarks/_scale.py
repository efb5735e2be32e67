"""What the benchmarks at the size of LF-AmazonTitles-1.3M share: 3.55 million synthetic keys with their labels.

The vectors are 20,000 clusters of very different sizes around 500 topics, on the unit sphere. RAEXMC_KEYS makes it
smaller, to try a benchmark.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from raexmc_ray.embed import Embeddings
from raexmc_ray.files import FileEntry, Folder, describe_file
from raexmc_ray.memory.shard import INSTANCE, LABEL
from raexmc_ray.memory.snapshot import TRAINED, Manifest, publish
from raexmc_ray.memory.write import SEGMENT, SnapshotPlan
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


def key_table() -> pa.Table:
    """Keys with texts and labels of a real size."""
    labels = KEYS - INSTANCES
    offsets = np.concatenate(
        [np.arange(INSTANCES) * LABELS_PER_INSTANCE, INSTANCES * LABELS_PER_INSTANCE + np.arange(labels + 1)]
    )
    votes = np.random.default_rng(2).integers(labels, size=offsets[-1], dtype=np.int32)
    votes[INSTANCES * LABELS_PER_INSTANCE :] = np.arange(labels)
    kinds = pa.DictionaryArray.from_arrays(
        np.repeat(np.array([0, 1], np.int8), [INSTANCES, labels]), pa.array([INSTANCE, LABEL])
    )
    ids = np.arange(KEYS)
    text = pa.array([f"the title of product {i}, of fifty or sixty letters" for i in range(KEYS)], pa.large_string())
    uid = pa.array([f"B{i:09d}" for i in range(KEYS)], pa.large_string())
    return pa.table(
        {
            "key_id": ids,
            "kind": kinds,
            "uid": uid,
            "text": text,
            "labels": pa.LargeListArray.from_arrays(offsets, votes),
        }
    )


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
