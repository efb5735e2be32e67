"""A snapshot from a corpus and its embeddings: the parts that a single process and a cluster share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus
from raexmc_ray.files import FileEntry, Folder, describe_file
from raexmc_ray.lexical import Lexical
from raexmc_ray.memory.defaults import with_defaults
from raexmc_ray.memory.kinds import IndexSpec, build_index, train_index
from raexmc_ray.memory.shard import INSTANCE, KEYS, LABEL
from raexmc_ray.memory.snapshot import (
    ENCODER,
    LABELS,
    TRAINED,
    Manifest,
    SnapshotError,
    is_complete,
    list_snapshots,
    memory_id,
    open_snapshot,
    publish,
    publish_again,
    shard_file,
    verify,
)
from raexmc_ray.recipe import MemorySection, PredictionSection

if TYPE_CHECKING:
    from raexmc_ray.encoder import TextEncoder

SEGMENT = "0000"
SAMPLE_SEED = 0


def key_table(corpus: Corpus) -> pa.Table:
    """All keys of a corpus in id order, instances first: key_id int64, kind, uid, text, labels (those that the key
    votes for: an instance for its labels, a label for itself)."""
    relevance: sp.csr_matrix = corpus.train.relevance
    instances, labels = relevance.shape
    texts = pa.concat_tables([corpus.train.texts, corpus.labels])
    kinds = pa.DictionaryArray.from_arrays(
        np.repeat(np.array([0, 1], np.int8), [instances, labels]), pa.array([INSTANCE, LABEL])
    )
    votes = np.concatenate([relevance.indices, np.arange(labels)]).astype(np.int32)
    offsets = np.concatenate([relevance.indptr.astype(np.int64), relevance.nnz + 1 + np.arange(labels)])
    # Large strings: with plain ones, two gigabytes of text are the most that a shard could have.
    return pa.table(
        {
            "key_id": pa.array(np.arange(instances + labels, dtype=np.int64)),
            "kind": kinds,
            "uid": texts["uid"].cast(pa.large_string()),
            "text": texts["text"].cast(pa.large_string()),
            "labels": pa.LargeListArray.from_arrays(offsets, votes),
        }
    ).combine_chunks()


def key_encoder(tower: TextEncoder, table: pa.Table, settings: MemorySection) -> TextEncoder:
    """The encoder of a memory's keys and queries: `tower`, with the lexical part that the settings ask for fitted on
    the keys' texts. table: from `key_table`."""
    lexical = settings.lexical
    if not lexical.weight:
        return tower.with_lexical(None)
    texts = table["text"].to_pylist()
    return tower.with_lexical(Lexical.fit(texts, dimension=lexical.dimension, weight=lexical.weight))


@dataclass(frozen=True)
class SnapshotPlan:
    """Where a snapshot goes, and the id that follows from what it is made of."""

    memory: Folder
    id: str
    shards: int
    index: IndexSpec

    @classmethod
    def of(
        cls,
        memory: Folder,
        corpus: Corpus,
        encoder: TextEncoder,
        settings: MemorySection,
        defaults: PredictionSection,
    ) -> SnapshotPlan:
        index = IndexSpec.of(settings, len(corpus.train) + len(corpus.labels), encoder.dimension)
        name = memory_id(corpus.fingerprint, encoder.fingerprint, settings.shards, index, defaults)
        return cls(memory, name, settings.shards, index)

    @property
    def folder(self) -> Folder:
        return self.memory / "snapshots" / self.id

    @property
    def work(self) -> Folder:
        """What a build that was stopped finds again; it is removed when the snapshot is published."""
        return self.memory / "building" / self.id


def published_before(plan: SnapshotPlan, corpus: Corpus, encoder: TextEncoder, defaults: PredictionSection) -> bool:
    """Make the plan's snapshot the current one where an earlier run finished it, or a whole one of the same keys with
    other defaults, whose files it then has; whether there was one. Raises NewerSnapshotError."""
    if not publish_again(plan.memory, plan.id) and not _published_from_another(plan, corpus, encoder, defaults):
        return False
    plan.work.remove()  # left by a build that was killed as soon as it had published
    return True


def _published_from_another(
    plan: SnapshotPlan, corpus: Corpus, encoder: TextEncoder, defaults: PredictionSection
) -> bool:
    for name in list_snapshots(plan.memory):
        with suppress(SnapshotError):  # a damaged one is none
            found = open_snapshot(plan.memory, name)
            made_of = corpus.fingerprint, encoder.fingerprint, plan.shards, plan.index
            if name == memory_id(*made_of, found.manifest.defaults):
                for _ in verify(found):  # its files become this one's: an altered one would come back for ever
                    pass
                return with_defaults(plan.memory, found, corpus.fingerprint, defaults) == plan.id
    return False


def publish_once(plan: SnapshotPlan, make: Callable[[], None]) -> str:
    """Have `make` write and publish the plan's snapshot, unless another build of it does so first; gives its id.

    Several may run at a time, on machines that know nothing of each other: a job that was sent twice. What one has
    published is what all of them want, and its files are never written again: readers have them mapped.
    """
    if not publish_again(plan.memory, plan.id):
        try:
            make()
        except Exception:  # whatever the files were about that the other one took away, or made
            if not publish_again(plan.memory, plan.id):
                raise
    return plan.id


def sample_keys(plan: SnapshotPlan, keys: int) -> np.ndarray:
    """int64, sorted: ids of the keys that the index is trained on, the same ones each time."""
    size = min(plan.index.sample, keys)
    return np.sort(np.random.default_rng(SAMPLE_SEED).choice(keys, size, replace=False))


def train(plan: SnapshotPlan, sample_ND: np.ndarray) -> bytes:
    """What all shards share, an empty trained index in FAISS's format, from the keys of `sample_keys`: float32."""
    trained = faiss.serialize_index(train_index(plan.index, sample_ND)).tobytes()
    (plan.work / TRAINED).write(trained)
    return trained


def trained_before(plan: SnapshotPlan) -> bytes | None:
    """What `train` made in a run that was stopped."""
    file = plan.work / TRAINED
    return None if file.size() is None else file.read()


def write_shard(
    plan: SnapshotPlan, shard: int, trained: bytes, table: pa.Table, blocks: Callable[[], Iterable[np.ndarray]]
) -> dict[str, FileEntry]:
    """Write one shard's files; returns their manifest entries.

    table: from `key_table`, the keys with id ≡ shard (mod shards), in id order. blocks: gives their embeddings in
    the same order, as `build_index` takes them. Raises FileExistsError where another build has published the snapshot,
    or another process wrote this shard meanwhile.
    """
    _refuse_published(plan)
    folder = plan.folder / f"segments/{SEGMENT}/shard-{shard:04d}"
    folder.remove()  # of a snapshot that lost its manifest: who has these files mapped keeps what is in them
    # Not in its place: a writer on a node that Ray has given up may go on when the snapshot is published and searched.
    with folder.appearing() as local:
        index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
        build_index(local, index, plan.index, len(table), blocks)
        (batch,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        with pa.ipc.new_file(str(local / KEYS), batch.schema) as writer:
            writer.write_batch(batch)
        names = *plan.index.files, KEYS
        entries = {shard_file(SEGMENT, shard, name): describe_file(local / name) for name in names}
    content = {name: entry.model_dump() for name, entry in entries.items()}
    (plan.work / f"shard-{shard:04d}.json").write(json.dumps(content).encode())
    return entries


def shards_before(plan: SnapshotPlan) -> dict[int, dict[str, FileEntry]]:
    """{shard: its manifest entries} of the shards that a run that was stopped has written to their end."""
    done = {}
    for shard in range(plan.shards):
        file = plan.work / f"shard-{shard:04d}.json"
        if file.size() is not None:
            entries = {name: FileEntry(**entry) for name, entry in json.loads(file.read()).items()}
            if is_written(plan, entries):
                done[shard] = entries
    return done


def is_written(plan: SnapshotPlan, entries: dict[str, FileEntry]) -> bool:
    """Whether the files of these entries are there, with all their bytes."""
    return all((plan.folder / name).size() == entry.size for name, entry in entries.items())


def finish_snapshot(
    plan: SnapshotPlan,
    corpus: Corpus,
    encoder: TextEncoder,
    trained: bytes,
    shards: Iterable[dict[str, FileEntry]],
    defaults: PredictionSection,
    recipe: dict[str, object] | None,
) -> None:
    """Add what the shards share, the encoder and the labels to the shards' files, and publish the snapshot.

    Raises FileExistsError where another build has published it, ValueError where one takes shards away meanwhile.
    """
    _refuse_published(plan)
    with plan.folder.filling() as local:
        encoder.save(local / ENCODER)
        names = [LABELS, *(f"{ENCODER}/{path.name}" for path in sorted((local / ENCODER).iterdir()))]
        index = pa.array(np.arange(len(corpus.labels), dtype=np.int64))
        pq.write_table(corpus.labels.add_column(0, "index", index), local / LABELS)
        if plan.index.lists:
            names.append(f"segments/{SEGMENT}/{TRAINED}")
            (local / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            (local / names[-1]).write_bytes(trained)
        files = {name: describe_file(local / name) for name in names}
        _refuse_published(plan)
    for entries in shards:
        files |= entries
    if not is_written(plan, files):
        raise ValueError(f"{plan.folder}: another build of this snapshot writes into it: run again when it has ended")
    (plan.folder / f"segments/{SEGMENT}").remove_left()
    manifest = Manifest(
        id=plan.id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        instances=len(corpus.train),
        labels=len(corpus.labels),
        dimension=encoder.dimension,
        shards=plan.shards,
        index=plan.index,
        segments=[SEGMENT],
        encoder_fingerprint=encoder.fingerprint,
        defaults=defaults,
        recipe=recipe,
        files=files,
    )
    publish(plan.memory, manifest)
    plan.folder.remove_left()  # not before: another build that it takes something from finds this one published
    plan.work.remove()


def _refuse_published(plan: SnapshotPlan) -> None:
    if is_complete(plan.memory, plan.id):
        raise FileExistsError(f"{plan.folder}: another build has published it meanwhile")


def _one_block(keys_ND: np.ndarray) -> list[np.ndarray]:
    return [keys_ND]


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
    table = key_table(corpus)
    encoder = key_encoder(encoder, table, settings)
    plan = SnapshotPlan.of(Folder.at(memory), corpus, encoder, settings, defaults)
    if published_before(plan, corpus, encoder, defaults):  # readers have its files mapped: never written again
        return plan.id
    keys_ND = encoder.encode(table["text"].to_pylist())

    def make() -> None:
        trained = train(plan, keys_ND[sample_keys(plan, len(keys_ND))])
        shards = []
        for shard in range(plan.shards):
            mine = np.arange(shard, len(table), plan.shards)
            shards.append(write_shard(plan, shard, trained, table.take(mine), partial(_one_block, keys_ND[mine])))
        finish_snapshot(plan, corpus, encoder, trained, shards, defaults, None)

    return publish_once(plan, make)
