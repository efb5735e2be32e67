"""What a memory takes before it is built: bytes of each shard, by part."""

from __future__ import annotations

from raexmc_ray.memory.index import GRAPH_LINKS, IndexSpec

ID_BYTES = 8
"""Of a key's position in an inverted list."""
BLOCK = 32
"""Keys that `ivf-pq` lays out together: a list is padded to a multiple of them."""


def index_bytes(spec: IndexSpec, keys: int) -> int:
    """Bytes of the index of one shard with so many keys, on disk and in memory: keys, ids, and the quantiser.

    Of a factory string nothing is known beforehand: as much as `flat` is assumed.
    """
    d, quantizer = spec.dimension, 4 * spec.dimension * spec.lists
    if spec.kind == "flat-fp16":
        return 2 * d * keys
    if spec.kind == "flat-sq8":
        return d * keys
    if spec.kind == "ivf-fp16":
        return (2 * d + ID_BYTES) * keys + quantizer
    if spec.kind == "ivf-pq":
        codes = (keys + spec.lists * BLOCK / 2) * spec.subvectors / 2
        return int(codes) + ID_BYTES * keys + quantizer + 4 * 16 * d
    if spec.kind == "hnsw":
        return (2 * d + 4 * 2 * GRAPH_LINKS + 8 + 4) * keys
    return 4 * d * keys


def vectors_bytes(spec: IndexSpec, keys: int) -> int:
    """Bytes of the float16 keys that a shard rescores with; 0 where its kind has none."""
    return 2 * spec.dimension * keys if spec.has_vectors else 0


def shard_bytes(spec: IndexSpec, keys: int) -> int:
    """Bytes of one shard with so many keys: its index and what it rescores with."""
    return index_bytes(spec, keys) + vectors_bytes(spec, keys)
