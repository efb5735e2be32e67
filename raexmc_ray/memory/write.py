"""A snapshot from a corpus and its embeddings: the parts that a single process and a cluster share."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import FileEntry, Folder, describe_file
from raexmc_ray.memory.index import FlatIndex
from raexmc_ray.memory.shard import INDEX, INSTANCE, KEYS, LABEL, VALUES
from raexmc_ray.memory.snapshot import (
    ENCODER,
    LABELS,
    Manifest,
    is_complete,
    publish,
    publish_current,
    shard_file,
    snapshot_id,
)
from raexmc_ray.recipe import MemorySection, PredictionSection

SEGMENT = "0000"


def key_table(corpus: Corpus) -> pa.Table:
    """All keys of a corpus in id order, instances first: key_id int64, kind, uid, text."""
    instances, labels = len(corpus.train), len(corpus.labels)
    texts = pa.concat_tables([corpus.train.texts, corpus.labels]).combine_chunks()
    kinds = pa.DictionaryArray.from_arrays(
        np.repeat(np.array([0, 1], np.int8), [instances, labels]), pa.array([INSTANCE, LABEL])
    )
    ids = pa.array(np.arange(instances + labels, dtype=np.int64))
    return pa.table({"key_id": ids, "kind": kinds, "uid": texts["uid"], "text": texts["text"]})


def value_lists(relevance: sp.csr_matrix) -> pa.LargeListArray:
    """For each key the labels that it votes for: an instance for its labels, a label for itself."""
    labels = relevance.shape[1]
    votes = np.concatenate([relevance.indices, np.arange(labels)]).astype(np.int32)
    offsets = np.concatenate([relevance.indptr.astype(np.int64), relevance.nnz + 1 + np.arange(labels)])
    return pa.LargeListArray.from_arrays(offsets, votes)


@dataclass(frozen=True)
class SnapshotPlan:
    """Where a snapshot goes, and the id that follows from what it is made of."""

    memory: Folder
    id: str
    shards: int

    @classmethod
    def of(
        cls, memory: Folder, corpus: Corpus, fingerprint: str, settings: MemorySection, defaults: str
    ) -> SnapshotPlan:
        parts = [corpus.fingerprint, fingerprint, str(settings.shards), settings.index, defaults]
        return cls(memory, snapshot_id(parts), settings.shards)

    @property
    def folder(self) -> Folder:
        return self.memory / "snapshots" / self.id

    @property
    def is_complete(self) -> bool:
        return is_complete(self.memory, self.id)


def write_shard(
    plan: SnapshotPlan, shard: int, keys_ND: np.ndarray, table: pa.Table, values: pa.LargeListArray
) -> dict[str, FileEntry]:
    """Write one shard's files; returns their manifest entries.

    keys_ND, table, values: the keys with id ≡ shard (mod shards), in id order.
    """
    assert len(keys_ND) == len(table) == len(values)
    with tempfile.TemporaryDirectory(prefix="raexmc-shard-") as scratch:
        local = Path(scratch)
        FlatIndex.build(keys_ND).write(local / INDEX)
        pq.write_table(table, local / KEYS)
        column = pa.table({"labels": values})
        with pa.ipc.new_file(str(local / VALUES), column.schema) as writer:
            writer.write_table(column)
        names = [INDEX, KEYS, VALUES]
        entries = {shard_file(SEGMENT, shard, name): describe_file(local / name) for name in names}
        (plan.folder / f"segments/{SEGMENT}/shard-{shard:04d}").upload(local)
    return entries


def finish_snapshot(
    plan: SnapshotPlan,
    corpus: Corpus,
    encoder: TextEncoder,
    entries: Mapping[str, FileEntry],
    settings: MemorySection,
    defaults: PredictionSection,
    recipe: dict[str, object] | None,
) -> None:
    """Add the encoder and the labels to the shards that `entries` lists, and publish the snapshot."""
    with tempfile.TemporaryDirectory(prefix="raexmc-snapshot-") as scratch:
        local = Path(scratch)
        encoder.save(local / ENCODER)
        index = pa.array(np.arange(len(corpus.labels), dtype=np.int64))
        pq.write_table(corpus.labels.add_column(0, "index", index), local / LABELS)
        files = {str(p.relative_to(local)): describe_file(p) for p in sorted(local.rglob("*")) if p.is_file()}
        plan.folder.upload(local)
    manifest = Manifest(
        id=plan.id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        instances=len(corpus.train),
        labels=len(corpus.labels),
        dimension=encoder.dimension,
        shards=plan.shards,
        index=settings.index,
        segments=[SEGMENT],
        encoder_fingerprint=encoder.fingerprint,
        defaults=defaults,
        recipe=recipe,
        files={**files, **entries},
    )
    publish(plan.memory, manifest)


def build_memory(
    corpus: Corpus,
    encoder: TextEncoder,
    memory: str | Path,
    settings: MemorySection | None = None,
    defaults: PredictionSection | None = None,
) -> str:
    """Embed a corpus and publish its memory, in this process, without a cluster. Returns the snapshot's id.

    corpus: its training part and labels become keys. encoder: any, trained for it or not. memory: a folder
    or URL. settings: shards and index. defaults: λ, temperature, neighbours and k of predictions.
    """
    settings, defaults = settings or MemorySection(), defaults or PredictionSection()
    plan = SnapshotPlan.of(
        Folder.at(memory), corpus, encoder.fingerprint, settings, defaults.model_dump_json(by_alias=True)
    )
    if plan.is_complete:  # readers have its files mapped: they are never written again
        publish_current(plan.memory, plan.id)
        return plan.id
    table, values = key_table(corpus), value_lists(corpus.train.relevance)
    keys_ND = encoder.encode(table["text"].to_pylist())
    entries: dict[str, FileEntry] = {}
    for shard in range(plan.shards):
        mine = np.arange(shard, len(table), plan.shards)
        entries |= write_shard(plan, shard, keys_ND[mine], table.take(mine), values.take(pa.array(mine)))
    finish_snapshot(plan, corpus, encoder, entries, settings, defaults, None)
    return plan.id
