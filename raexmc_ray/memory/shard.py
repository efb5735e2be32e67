"""A shard: a disjoint part of the keys, with their values and their index, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from raexmc_ray.memory.hits import Hits, merge_hits
from raexmc_ray.memory.index import FlatIndex
from raexmc_ray.memory.snapshot import Snapshot, SnapshotError, shard_file
from raexmc_ray.ragged import ragged_take
from raexmc_ray.recipe import Neighbours

INDEX, VALUES, KEYS = "index.faiss", "values.arrow", "keys.parquet"
INSTANCE, LABEL = "instance", "label"


class Shard:
    """One shard of a snapshot, opened for searching. Keys lie in the order of their ids, instances first."""

    def __init__(self, snapshot: Snapshot, shard: int, *, verify: bool = True) -> None:
        """verify: read every byte against its checksum first (sizes are checked in any case)."""
        segments = snapshot.manifest.segments
        if len(segments) != 1:
            raise SnapshotError(f"{snapshot.folder}: has {len(segments)} segments; this version reads one")
        if not 0 <= shard < snapshot.manifest.shards:
            raise ValueError(f"there is no shard {shard}: the memory has {snapshot.manifest.shards}")
        paths = {name: snapshot.file(shard_file(segments[0], shard, name), verify) for name in (INDEX, VALUES, KEYS)}
        self.snapshot = snapshot.manifest.id
        self._index = FlatIndex.read(paths[INDEX])
        with pa.memory_map(str(paths[VALUES])) as source:
            values = pa.ipc.open_file(source).read_all()["labels"].combine_chunks()
        self._vote_offsets = np.asarray(values.offsets, np.int64)
        self._votes = np.asarray(values.values, np.int32)
        self._keys = pq.read_table(paths[KEYS], memory_map=True).combine_chunks()
        self._key_ids = np.asarray(self._keys["key_id"], np.int64)
        self._instances = int(np.searchsorted(self._key_ids, snapshot.manifest.instances))
        counts = {INDEX: len(self._index), VALUES: len(self._vote_offsets) - 1, KEYS: len(self._keys)}
        if len(set(counts.values())) != 1:
            raise SnapshotError(f"{paths[INDEX].parent}: files of different lengths: {counts}")

    def __len__(self) -> int:
        return len(self._index)

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        """This shard's best keys for each query: float32 [B, d], of unit length."""
        if neighbours.joint is not None:
            return self._search(queries_BD, neighbours.joint, 0, len(self))
        instances = self._search(queries_BD, neighbours.instances or 0, 0, self._instances)
        labels = self._search(queries_BD, neighbours.labels or 0, self._instances, len(self))
        return merge_hits([instances, labels], neighbours)

    def _search(self, queries_BD: np.ndarray, b: int, start: int, stop: int) -> Hits:
        positions_Bb, scores_Bb = self._index.search(queries_BD, b, start, stop)
        votes, offsets = ragged_take(self._votes, self._vote_offsets, positions_Bb.ravel())
        is_label_Bb = positions_Bb >= self._instances
        return Hits(self._key_ids[positions_Bb], scores_Bb, is_label_Bb, votes, offsets, self.snapshot)

    def keys(self, key_ids: np.ndarray) -> pa.Table:
        """The rows (key_id, kind, uid, text) of those of `key_ids` that lie in this shard, in id order."""
        ids = np.unique(key_ids)
        positions = np.searchsorted(self._key_ids, ids)
        inside = positions < len(self)
        positions, ids = positions[inside], ids[inside]
        return self._keys.take(positions[self._key_ids[positions] == ids])


def use_threads(threads: int) -> None:
    """Give FAISS so many threads in this process: one a CPU that it owns, or it stalls (faiss#2502)."""
    faiss.omp_set_num_threads(threads)


def join_keys(parts: Sequence[pa.Table]) -> dict[int, dict[str, str]]:
    """{key id: {"kind", "uid", "text"}} from what shards gave for the same ids."""
    table = pa.concat_tables(parts)
    rows = table.drop_columns(["key_id"]).to_pylist()
    return dict(zip(table["key_id"].to_pylist(), rows, strict=True))


class Shards(Protocol):
    """All shards of one snapshot, wherever they are: in this process, or in actors."""

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        """The memory's best keys for each query: float32 [B, d], of unit length."""

    def keys(self, key_ids: np.ndarray) -> dict[int, dict[str, str]]:
        """{key id: {"kind", "uid", "text"}} of these keys."""


class LocalShards:
    """All shards of a snapshot in this process."""

    def __init__(self, snapshot: Snapshot, *, verify: bool = True) -> None:
        self._shards = [Shard(snapshot, i, verify=verify) for i in range(snapshot.manifest.shards)]

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        return merge_hits([shard.search(queries_BD, neighbours) for shard in self._shards], neighbours)

    def keys(self, key_ids: np.ndarray) -> dict[int, dict[str, str]]:
        return join_keys([shard.keys(key_ids) for shard in self._shards])
