"""Ray Data: texts to embeddings, in units that are computed once.

Keys are cut into units of consecutive ids. An encoder actor embeds a unit and writes it to a file of its own in
one atomic step; a run that was stopped computes only the units that are missing. A unit's file has one record
batch a shard, so that a shard reads its own rows only.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from raexmc_ray.encoder import TextEncoder, bfloat16_is_native
from raexmc_ray.files import Folder
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import ClusterSection, EncoderSection

UNIT_KEYS = 4096
"""Keys in a unit."""


def embed_keys(
    table: pa.Table,
    encoder: Folder,
    folder: Folder,
    shards: int,
    section: EncoderSection,
    cluster: ClusterSection,
) -> None:
    """Write the embeddings of all keys under `folder`, which belongs to this table, encoder and sharding.

    table: Arrow (key_id, text, …), ids 0, 1, 2 …. encoder: folder that every node sees.
    """
    units = math.ceil(len(table) / UNIT_KEYS)
    done = set(folder.names())
    missing = [unit for unit in range(units) if _unit_file(unit) not in done]
    rows = {unit: min(UNIT_KEYS, len(table) - unit * UNIT_KEYS) for unit in range(units)}
    total, finished = len(table), len(table) - sum(rows[unit] for unit in missing)
    if not missing:
        return
    texts = table.select(["key_id", "text"])
    # One block a unit, so that a unit reaches an actor whole, and is batched the same way whoever does it.
    blocks = [texts.slice(unit * UNIT_KEYS, rows[unit]).combine_chunks() for unit in missing]
    arguments = (encoder, folder, shards, section.batch_size, int(cluster.cpus_per_worker))
    with Progress("embed", total, "keys", done=finished) as progress:
        for keys in map_units(blocks, _UnitEncoder, arguments, cluster):
            progress.add(keys)


def map_units(
    blocks: Sequence[pa.Table], worker: type, arguments: tuple[Any, ...], cluster: ClusterSection
) -> Iterator[int]:
    """Hand each block whole to one of a pool of encoder actors; gives the rows done as they are done.

    worker: class whose instances, made with `arguments`, map a block to {"rows": [number]}.
    """
    quiet_data()
    done = ray.data.from_arrow(list(blocks)).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(cluster.encoders, len(blocks))),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=1 if cluster.gpu else 0,
        ray_remote_args_fn=_bounded_retries,
    )
    for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
        yield int(batch["rows"].sum())


class _UnitEncoder:
    """An actor that embeds units."""

    def __init__(self, encoder: Folder, folder: Folder, shards: int, batch_size: int, threads: int) -> None:
        self._encoder = use_hardware(TextEncoder.load(encoder.path), threads)
        self._folder, self._shards, self._batch_size = folder, shards, batch_size

    def __call__(self, unit: pa.Table) -> dict[str, np.ndarray]:
        ids = unit["key_id"].to_numpy()
        embeddings_ND = self._encoder.encode(unit["text"].to_pylist(), self._batch_size)
        sink = pa.BufferOutputStream()
        schema = pa.schema({"key_id": pa.int64(), "embedding": pa.list_(pa.float32(), self._encoder.dimension)})
        with pa.ipc.new_file(sink, schema) as writer:
            for shard in range(self._shards):
                mine = np.flatnonzero(ids % self._shards == shard)
                flat = pa.array(embeddings_ND[mine].ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, self._encoder.dimension)
                writer.write_batch(pa.record_batch([pa.array(ids[mine]), vectors], schema=schema))
        (self._folder / _unit_file(int(ids[0]) // UNIT_KEYS)).write(sink.getvalue())
        return {"rows": np.array([len(ids)])}


def read_shard(folder: Folder, shard: int, keys: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(key ids int64 [n], embeddings float32 [n, d]) of one shard, a unit at a time, in id order."""
    for unit in range(math.ceil(keys / UNIT_KEYS)):
        file = folder / _unit_file(unit)
        with file.filesystem.open_input_file(file.path) as source:
            batch = pa.ipc.open_file(source).get_batch(shard)
            ids = batch["key_id"].to_numpy()
            yield ids, batch["embedding"].flatten().to_numpy().reshape(len(ids), -1)


def use_hardware(encoder: TextEncoder, threads: int) -> TextEncoder:
    """`encoder`, moved to this process's GPU where it owns one; else it gets so many CPU threads."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        encoder.to(device)
        if bfloat16_is_native(device):
            encoder.compute_dtype = torch.bfloat16
    else:
        torch.set_num_threads(max(1, threads))
    return encoder


def quiet_data() -> None:
    """Keep Ray Data's own progress out of the way of our one line, and rows from being dropped in silence."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Both ways to bound an actor's retries are called deprecated in Ray 2.60, and there is no third.
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")


def _bounded_retries() -> dict[str, int]:
    """Options of an actor in a pool. Ray Data would start a crashing one again for ever; this ends the job."""
    return {"max_restarts": 3, "max_task_retries": 3}


def _unit_file(unit: int) -> str:
    return f"unit-{unit:06d}.arrow"
