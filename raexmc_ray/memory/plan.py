"""What a memory takes, before it is built: bytes of each shard, number of shards, hours."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from raexmc_ray.memory.kinds import FACTORY, GRAPH_LINKS, KMEANS_ROUNDS, IndexSpec
from raexmc_ray.recipe import MemorySection

ID_BYTES = 8
"""Of a key's position in an inverted list."""
BLOCK = 32
"""Keys that `ivf-pq` lays out together: a list is padded to a multiple of them."""
SHARD_LIMIT = 4 << 30
"""Bytes of a shard beyond which more shards are better: it is what an actor loads, and what is lost with it."""
SHARD_WORTH = 1 << 28
"""Bytes below which a shard is not worth an actor of its own."""
HEADROOM = 0.7
"""Share of a machine's memory that shards may take."""
PROCESS_BYTES = 200 << 20
"""Of a process that builds, beside what it builds: Ray, FAISS and Arrow (117 MiB at rest), and what runs differ by."""
BLOCK_KEYS = 1 << 16
"""Keys, of all shards together, whose embeddings reach the indexes at a time: those of embed.py's BLOCK_UNITS."""
BLOCK_BYTES = 8
"""Of a number in such a block: as it is read, as it is joined, and in float32."""
SAMPLE_BYTES = 12
"""Of a number of the sample that an index is trained on: as it is read, as it is put in order, and in float32."""
CORE_FLOPS = 60e9
"""Float32 operations a second of one core in a matrix product: assumed, of the right order for a server's core."""
WRITE_RATE = 300e6
"""Bytes of shards that a machine writes a second, their embeddings read and their checksums made: assumed, too."""
KEY_BYTES = 40
"""Of a key beside its text and labels: id, kind, offsets, uid."""


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
        return _code_bytes(spec, keys) + ID_BYTES * keys + quantizer + 4 * 16 * d
    if spec.kind == "hnsw":
        return (2 * d + 4 * 2 * GRAPH_LINKS + 8 + 4) * keys
    return 4 * d * keys


def _code_bytes(spec: IndexSpec, keys: int) -> int:
    """Bytes of the codes of `ivf-pq`: half a byte a part of a key, in lists that are half a block longer on average."""
    return int((keys + spec.lists * BLOCK / 2) * spec.subvectors / 2)


def vectors_bytes(spec: IndexSpec, keys: int) -> int:
    """Bytes of the float16 keys that a shard rescores with, and of their order; 0 where its kind has none."""
    return (2 * spec.dimension + 4) * keys if spec.has_vectors else 0


def shard_bytes(spec: IndexSpec, keys: int) -> int:
    """Bytes of one shard with so many keys: its index and what it rescores with."""
    return index_bytes(spec, keys) + vectors_bytes(spec, keys)


def build_bytes(spec: IndexSpec, keys: int, shards: int, table: int) -> int:
    """Bytes of the process that writes one of so many shards, with so many keys, at its peak.

    table: bytes of the keys' texts and labels.
    """
    block = BLOCK_BYTES * spec.dimension * min(keys, BLOCK_KEYS // shards)
    index = index_bytes(spec, keys)
    # What FAISS fills key by key grows by doubling.
    growing = _code_bytes(spec, keys) + ID_BYTES * keys if spec.kind == "ivf-pq" else 0
    if spec.kind == "hnsw" or spec.kind.startswith(FACTORY):
        growing = index
    # First the index is filled, then what is kept to rescore with, of which no block comes in float32.
    return PROCESS_BYTES + index + max(growing + block, vectors_bytes(spec, keys) + block // 2) + table


def training_bytes(spec: IndexSpec) -> int:
    """Bytes of the process that trains what all shards share, at its peak: FAISS adds nothing to speak of."""
    return PROCESS_BYTES + SAMPLE_BYTES * spec.dimension * spec.sample


class MemoryPlan(BaseModel):
    """What a memory takes: bytes, shards and hours, before anything is built."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    index: IndexSpec
    keys: int
    shards: int
    shard_memory: int
    """Bytes that a shard's actor maps: its index and what it rescores with."""
    shard_disk: int
    """Bytes of a shard's files: that, and the keys' texts and labels."""
    embeddings_disk: int
    """Bytes of the embeddings that a build leaves beside the memory, all shards together."""
    build_memory: int
    """Bytes that building one shard takes."""
    training_memory: int
    """Bytes that training the index takes, on one machine, before any shard is built."""
    embed_hours: float
    build_hours: float | None
    """None where there is no estimate: of hnsw and factory strings."""


def plan_memory(
    section: MemorySection,
    *,
    instances: int,
    labels: int,
    dimension: int,
    machines: int,
    machine_memory: int,
    machine_cpus: int,
    texts_per_second: float,
    text_bytes: float,
    labels_per_instance: float,
) -> MemoryPlan:
    """The plan of a memory on so many equal machines; `section.shards` is not looked at: it is a result.

    machine_memory: bytes. texts_per_second: of one machine's encoders. text_bytes: of a mean text.
    Raises ValueError where it does not fit, with what would.
    """
    keys = instances + labels
    index = IndexSpec.of(section, keys, dimension)
    total = shard_bytes(index, keys)
    room = int(HEADROOM * machine_memory)
    if total > machines * room:
        needed = -(-total // room)
        raise ValueError(
            f"{section.index} keys take {total / 2**30:,.1f} GiB, and {machines} machines have room for "
            f"{machines * room / 2**30:,.1f}: take {needed} machines, or an index with fewer bytes a key (flat-sq8)"
        )
    on_a_machine = -(-total // machines)
    # As many as a machine has cores, if they are worth an actor each, and more where one would be too large.
    each = max(min(machine_cpus, -(-on_a_machine // SHARD_WORTH)), -(-on_a_machine // SHARD_LIMIT))
    shards = machines * each
    rows = -(-keys // shards)
    memory = shard_bytes(index, rows)
    beside = KEY_BYTES * keys + text_bytes * keys + 4 * (labels_per_instance * instances + labels)
    training = 2 * index.sample * KMEANS_ROUNDS * index.lists * dimension
    filling = 2 * keys * index.lists * dimension / machines
    seconds = (training + filling) / (CORE_FLOPS * machine_cpus) + total / machines / WRITE_RATE
    is_known = index.kind != "hnsw" and not index.kind.startswith(FACTORY)
    return MemoryPlan(
        index=index,
        keys=keys,
        shards=shards,
        shard_memory=memory,
        shard_disk=memory + int(beside / shards),
        embeddings_disk=keys * dimension * (4 if index.stores_float32 else 2),
        build_memory=build_bytes(index, rows, shards, int(beside / shards)),
        training_memory=training_bytes(index),
        embed_hours=keys / texts_per_second / machines / 3600,
        build_hours=seconds / 3600 if is_known else None,
    )
