"""A shard: a disjoint part of the keys, with their values and their index, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from raexmc_ray.memory.hits import Hits, merge_hits, search_all
from raexmc_ray.memory.index import Lists, ShardIndex
from raexmc_ray.memory.snapshot import Snapshot, SnapshotError, shard_file
from raexmc_ray.ragged import RaggedRows
from raexmc_ray.recipe import Neighbours

KEYS = "keys.arrow"
INSTANCE, LABEL = "instance", "label"


class Shard:
    """One shard of a snapshot, opened for searching. Keys lie in the order of their ids, instances first."""

    def __init__(self, snapshot: Snapshot, shard: int, *, verify: bool = True, gpu: bool = False) -> None:
        """verify: read every byte against its checksum first (sizes are checked in any case). gpu: search on this
        process's GPU."""
        manifest = snapshot.manifest
        if len(manifest.segments) != 1:
            raise SnapshotError(f"{snapshot.folder}: has {len(manifest.segments)} segments; this version reads one")
        if not 0 <= shard < manifest.shards:
            raise ValueError(f"there is no shard {shard}: the memory has {manifest.shards}")
        names = *manifest.index.files, KEYS
        paths = [snapshot.file(shard_file(manifest.segments[0], shard, name), verify) for name in names]
        self.snapshot = manifest.id
        self._index = ShardIndex(paths[0].parent, manifest.index, manifest.shards, gpu=gpu)
        self._keys = read_keys(paths[-1])
        if len(self._index) != len(self._keys):
            raise SnapshotError(f"{paths[0].parent}: {len(self._index)} keys in the index, {len(self._keys)} beside it")
        # Not `to_numpy`: it imports pandas, a third of a second in which a restarted shard does not answer.
        self._key_ids = np.from_dlpack(self._keys["key_id"].chunk(0))
        values = self._keys["labels"].chunk(0)
        self._votes = RaggedRows(np.from_dlpack(values.values), np.from_dlpack(values.offsets))
        self._instances = int(np.searchsorted(self._key_ids, manifest.instances))

    def __len__(self) -> int:
        return len(self._index)

    def search(
        self,
        queries_BD: np.ndarray,
        neighbours: Neighbours,
        lists: Lists | None = None,
        asked: Neighbours | None = None,
    ) -> Hits:
        """This shard's best keys for each query: float32 [B, d], of unit length.

        neighbours: how many are wanted of the whole memory, on which it depends how well an approximate index looks.
        lists: from the snapshot's quantiser, for kinds of index that have one. asked: how many of its best the shard
        gives; as many as are wanted of the memory where left out.
        """
        asked = asked or neighbours
        if neighbours.joint is not None:
            return self._search(queries_BD, (neighbours.joint, asked.joint), 0, len(self), lists)
        instances = self._search(queries_BD, (neighbours.instances, asked.instances), 0, self._instances, lists)
        labels = self._search(queries_BD, (neighbours.labels, asked.labels), self._instances, len(self), lists)
        return merge_hits([instances, labels], asked)

    def _search(
        self, queries_BD: np.ndarray, numbers: tuple[int | None, int | None], start: int, stop: int, lists: Lists | None
    ) -> Hits:
        wanted, asked = (number or 0 for number in numbers)
        positions_Bb, scores_Bb = self._index.search(queries_BD, asked, start, stop, lists, wanted=wanted)
        found = positions_Bb >= 0
        positions = positions_Bb[found]
        votes, offsets = self._votes.take(positions)
        key_ids_Bb, ends = np.full(found.shape, -1, np.int64), np.cumsum(found)
        key_ids_Bb[found] = self._key_ids[positions]
        vote_offsets = offsets[np.concatenate([[0], ends])]
        return Hits(key_ids_Bb, scores_Bb, positions_Bb >= self._instances, votes, vote_offsets, self.snapshot)

    def keys(self, key_ids: np.ndarray) -> pa.Table:
        """The rows (key_id, kind, uid, text) of those of `key_ids` that lie in this shard, in id order."""
        ids = np.unique(key_ids)
        positions = np.searchsorted(self._key_ids, ids)
        inside = positions < len(self)
        positions, ids = positions[inside], ids[inside]
        return self._keys.drop_columns(["labels"]).take(positions[self._key_ids[positions] == ids])


def read_keys(path: Path) -> pa.Table:
    """The keys of a shard by memory map: (key_id, kind, uid, text, labels), in one batch."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def join_keys(parts: Sequence[pa.Table]) -> dict[int, dict[str, str]]:
    """{key id: {"kind", "uid", "text"}} from what shards gave for the same ids."""
    table = pa.concat_tables(parts)
    rows = table.drop_columns(["key_id"]).to_pylist()
    return dict(zip(table["key_id"].to_pylist(), rows, strict=True))


def cut_texts(table: pa.Table, characters: int) -> pa.Table:
    """The table with no text of more than so many characters: of a longer one the last of them is "…"."""
    texts = table["text"]
    longer = pc.greater(pc.utf8_length(texts), characters)
    if not pc.any(longer).as_py():
        return table
    end, between = (pa.scalar(text, texts.type) for text in ("…", ""))
    cut = pc.binary_join_element_wise(pc.utf8_slice_codeunits(texts, 0, characters - 1), end, between)
    return table.set_column(table.column_names.index("text"), "text", pc.if_else(longer, cut, texts))


def key_rows(parts: Sequence[pa.Table], key_ids: np.ndarray) -> pa.Table:
    """The rows (key_id, kind, uid, text) of `key_ids`, in their order and as often as they are there, from what shards
    gave for them."""
    table = pa.concat_tables(parts).combine_chunks()
    ids = table["key_id"].to_numpy()
    order = np.argsort(ids)
    return table.take(order[np.searchsorted(ids, key_ids, sorter=order)])


class Shards(Protocol):
    """All shards of one snapshot, wherever they are: in this process, or in actors."""

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        """The memory's best keys for each query: float32 [B, d], of unit length."""

    def keys(self, key_ids: np.ndarray) -> dict[int, dict[str, str]]:
        """{key id: {"kind", "uid", "text"}} of these keys."""


class LocalShards:
    """All shards of a snapshot in this process."""

    def __init__(self, snapshot: Snapshot, *, verify: bool = True) -> None:
        self._quantizer = snapshot.quantizer(verify)
        self._shards = [Shard(snapshot, i, verify=verify) for i in range(snapshot.manifest.shards)]

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        lists = self._quantizer.assign(queries_BD) if self._quantizer else None

        def ask(rows: Any, asked: Neighbours) -> list[Hits]:
            some, into = queries_BD[rows], lists and lists.of(rows)
            return [shard.search(some, neighbours, into, asked) for shard in self._shards]

        return search_all(ask, neighbours, len(self._shards))

    def keys(self, key_ids: np.ndarray) -> dict[int, dict[str, str]]:
        return join_keys([shard.keys(key_ids) for shard in self._shards])
