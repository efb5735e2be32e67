"""Ray Data: texts to embeddings, in units that are computed once.

Keys are cut into units of consecutive ids. An encoder actor embeds a unit and writes it to a file of its own in
one atomic step; a run that was stopped computes only the units that are missing. A unit's file has one record
batch a shard, so that a shard reads its own rows only. All units are computed in one precision, which the hardware
that begins them chooses: a run that goes on elsewhere keeps to it, and so do nodes of another kind.

The encoder's module is imported where it is needed: tasks that build shards import this one, and torch and transformers
take several seconds.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from raexmc_ray.cluster import KEEP_FREED_MEMORY, refuse_unplaceable
from raexmc_ray.files import Folder, Scratch
from raexmc_ray.inputs.rows import failures
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import ClusterSection, EncoderSection, Precision

if TYPE_CHECKING:
    from raexmc_ray.encoder import TextEncoder

UNIT_KEYS = 4096
"""Keys in a unit."""
COMPUTED_IN: dict[Precision, str] = {"bfloat16": ".computed-in-bfloat16", "float32": ".computed-in-float32"}
"""The empty file beside the units that says in what precision all of them are computed."""
STAGED = "staged"
"""Written into the folder of a given encoder once all of it is there."""
NAMES = ("kind", "uid")
"""Columns that name a row to people, where a table has them."""
BLOCK_UNITS = 16
"""Units whose rows of a shard are handed to its index together."""
READERS = 16
"""Units that are read at a time: an object store makes each of them wait."""
logger = logging.getLogger("raexmc_ray")


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of keys 0 … keys − 1 under a folder, cut for so many shards, each number of this dtype."""

    folder: Folder
    keys: int
    shards: int
    dtype: str

    @property
    def units(self) -> int:
        return math.ceil(self.keys / UNIT_KEYS)

    def size(self, unit: int) -> int:
        """Keys in a unit."""
        return min(UNIT_KEYS, self.keys - unit * UNIT_KEYS)

    def missing(self) -> list[int]:
        """Units that are not there yet."""
        there = set(self.folder.names())
        return [unit for unit in range(self.units) if _unit_file(unit) not in there]

    def write(self, unit: int, vectors_ND: np.ndarray) -> None:
        """Put a unit's embeddings there in one atomic step: a record batch a shard, its keys in id order."""
        first, d = unit * UNIT_KEYS, vectors_ND.shape[1]
        type_ = pa.from_numpy_dtype(np.dtype(self.dtype))
        schema = pa.schema({"key_id": pa.int64(), "embedding": pa.list_(type_, d)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            for shard in range(self.shards):
                mine = np.arange((shard - first) % self.shards, len(vectors_ND), self.shards)
                flat = pa.array(vectors_ND[mine].astype(self.dtype, copy=False).ravel(), type_)
                vectors = pa.FixedSizeListArray.from_arrays(flat, d)
                writer.write_batch(pa.record_batch([pa.array(first + mine), vectors], schema=schema))
        (self.folder / _unit_file(unit)).write(sink.getvalue())

    def of_shard(self, shard: int) -> Iterator[np.ndarray]:
        """Embeddings [n, d] of a shard's keys in id order, a block at a time. Raises ValueError for a unit that is
        torn, or has other keys than it must have."""
        with ThreadPoolExecutor(READERS) as threads:
            for start in range(0, self.units, BLOCK_UNITS):
                units = range(start, min(start + BLOCK_UNITS, self.units))
                parts = threads.map(lambda unit: self._parts(unit, [shard])[0][1], units)
                yield np.concatenate(list(parts))

    def take(self, key_ids: np.ndarray) -> np.ndarray:
        """Embeddings [n, d] of these keys, which are sorted. Raises ValueError as `of_shard`."""
        units, starts = np.unique(key_ids // UNIT_KEYS, return_index=True)
        if not len(units):
            return np.empty((0, self._parts(0, [0])[0][1].shape[1]), self.dtype)
        with ThreadPoolExecutor(READERS) as threads:
            return np.concatenate(list(threads.map(self._taken, units.tolist(), np.split(key_ids, starts[1:]))))

    def _taken(self, unit: int, key_ids: np.ndarray) -> np.ndarray:
        """Embeddings [n, d] of these keys of a unit."""
        shards, place = np.unique(key_ids % self.shards, return_inverse=True)
        parts = self._parts(unit, shards.tolist())
        taken = np.empty((len(key_ids), parts[0][1].shape[1]), self.dtype)
        for number, (ids, vectors) in enumerate(parts):
            taken[place == number] = vectors[np.searchsorted(ids, key_ids[place == number])]
        return taken

    def _parts(self, unit: int, shards: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(key ids int64 [n], embeddings [n, d]) of each shard's keys in a unit: by memory map where the file is
        local."""
        file, parts, remedy = self.folder / _unit_file(unit), [], "remove it, and run the same command again"
        with pa.memory_map(file.path) if file.is_local else file.filesystem.open_input_file(file.path) as source:
            try:
                opened = pa.ipc.open_file(source)
                batches = [opened.get_batch(shard) for shard in shards]
            except pa.ArrowException as error:
                raise ValueError(f"{file}: is torn ({error}): {remedy}") from None
            for shard, batch in zip(shards, batches, strict=True):
                ids, vectors = batch["key_id"].to_numpy(), batch["embedding"]
                first, end = unit * UNIT_KEYS, unit * UNIT_KEYS + self.size(unit)
                if not np.array_equal(ids, np.arange(first + (shard - first) % self.shards, end, self.shards)):
                    raise ValueError(f"{file}: has other keys than it must have: {remedy}")
                parts.append((ids, vectors.flatten().to_numpy().reshape(len(ids), vectors.type.list_size)))
        return parts


def precision_of(folder: Folder) -> Precision | None:
    """In which the units in a folder are computed; None where nobody has begun. Raises ValueError where two have, in
    two."""
    names = folder.names()
    there = [precision for precision, name in COMPUTED_IN.items() if name in names]
    if len(there) > 1:
        raise ValueError(
            f"{folder}: was begun in bfloat16 and in float32 at once, by nodes of two kinds: remove it, and run the "
            "same command again"
        )
    return there[0] if there else None


def say_precision(folder: Folder) -> None:
    """Tell in which precision the units in a folder go on, where they were begun. Raises as `precision_of`."""
    precision = precision_of(folder)
    if precision:
        logger.info("%s: goes on in %s, in which it was begun", folder, precision)


def keys_encoder(encoder: Folder, units: Folder, threads: int, gpu: bool) -> TextEncoder:
    """The encoder of a folder, for this process to compute some of the units in another: in its hardware's precision,
    unless they were begun in another. Raises ValueError where the encoder is not seen here, and as `precision_of`."""
    from raexmc_ray.encoder import use_hardware

    if not encoder.names():
        raise ValueError(f"{encoder}: is not seen by every node: set cluster.storage, or --output, to a folder that is")
    tower = use_hardware(load_encoder(encoder), threads, keys=True, gpu=gpu)
    begun = precision_of(units)
    if begun is None:
        (units / COMPUTED_IN[tower.precision]).write(b"")
        precision_of(units)  # before any unit is written: of two that begin at the same time, one sees both
    elif begun != tower.precision:
        tower = use_hardware(load_encoder(encoder), threads, begun, gpu=gpu)
    return tower


def embed_keys(
    table: pa.Table, encoder: Folder, embeddings: Embeddings, section: EncoderSection, cluster: ClusterSection
) -> None:
    """Write those units of `embeddings` that are missing.

    table: Arrow (key_id, text, …), ids 0, 1, 2 …; columns of NAMES are for errors. encoder: folder that every node
    sees. Raises ValueError, which names the row, for a text that cannot be encoded.
    """
    missing = embeddings.missing()
    if missing:
        say_precision(embeddings.folder)
        finished = len(table) - sum(map(embeddings.size, missing))
        texts = table.select(["key_id", *(name for name in NAMES if name in table.column_names), "text"])
        # One block a unit, so that a unit reaches an actor whole, and is batched the same way whoever does it.
        blocks = [texts.slice(unit * UNIT_KEYS, embeddings.size(unit)).combine_chunks() for unit in missing]
        arguments = (encoder, embeddings, section.batch_size, int(cluster.cpus_per_worker), cluster.gpu)
        with Progress("embed", len(table), "keys", done=finished) as progress:
            for keys in map_units(blocks, _UnitEncoder, arguments, cluster):
                progress.add(keys)
    embeddings.folder.remove_half_written("unit-")  # by actors that were killed


def map_units(
    blocks: Sequence[pa.Table],
    worker: type,
    arguments: tuple[Any, ...],
    cluster: ClusterSection,
    blocks_at_a_time: int = 1,
) -> Iterator[int]:
    """Hand each block whole to one of a pool of encoder actors; gives the rows done as they are done.

    The pool begins with `cluster.encoders` actors, as far as there is room for them, and works with one at least.

    worker: class whose instances, made with `arguments`, map a block to {"rows": [number]}, or to {"error": [what is
    wrong with it]}, which is raised here as a ValueError: of an exception in there Ray Data keeps the traces only.
    blocks: all but the last are of the same length. blocks_at_a_time: an instance is called by so many threads.
    Raises ValueError where no node has room for an actor.
    """
    quiet_data()
    needed, remedy = {"CPU": cluster.cpus_per_worker}, "lower cluster.cpus_per_worker"
    if cluster.gpu:
        needed, remedy = needed | {"GPU": 1}, f"{remedy} or set cluster.gpu=false (leave out --gpu)"
    refuse_unplaceable("an encoder actor", needed, remedy)
    encoders = min(cluster.encoders, len(blocks))
    done = ray.data.from_arrow(list(blocks)).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=len(blocks[0]),  # a block: all but the last are as long. (With GPUs Ray takes no None.)
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=encoders,
            initial_size=encoders,
            # None waits in the queue of an actor while another has nothing to do.
            max_tasks_in_flight_per_actor=blocks_at_a_time,
            max_concurrent_calls_per_actor=blocks_at_a_time,
            enable_true_multi_threading=blocks_at_a_time > 1,
        ),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=1 if cluster.gpu else 0,
        runtime_env={"env_vars": KEEP_FREED_MEMORY},
        ray_remote_args_fn=_bounded_retries,
    )
    for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
        for error in batch.get("error", ()):
            raise ValueError(error)
        yield int(batch["rows"].sum())


class _UnitEncoder:
    """An actor that embeds units."""

    def __init__(self, encoder: Folder, embeddings: Embeddings, batch_size: int, threads: int, gpu: bool) -> None:
        self._refused = ""  # for a call to say: Ray Data makes a trace of what is raised here
        try:
            self._encoder = keys_encoder(encoder, embeddings.folder, threads, gpu)
        except (ValueError, OSError) as error:
            self._refused = str(error)
        self._embeddings, self._batch_size = embeddings, batch_size

    def __call__(self, unit: pa.Table) -> dict[str, np.ndarray]:
        if self._refused:
            return {"error": np.array([self._refused])}
        texts = unit["text"].to_pylist()
        try:
            vectors_ND = self._encoder.encode(texts, self._batch_size)
        except Exception:
            for row, error in failures(texts, self._encoder.encode):
                said = f"{_name(unit, row)}: this text cannot be encoded ({type(error).__name__}: {error})"
                return {"error": np.array([said])}
            raise
        wrong = np.flatnonzero(~np.isfinite(vectors_ND).all(1))
        if len(wrong):
            said = (
                f"{_name(unit, int(wrong[0]))}: the encoder's embedding of this text is not finite, nor are "
                f"{len(wrong) - 1} others of its unit: the encoder's weights are broken"
            )
            return {"error": np.array([said])}
        try:
            self._embeddings.write(unit["key_id"][0].as_py() // UNIT_KEYS, vectors_ND)
        except OSError as error:  # no space, no rights, a store that does not answer
            return {"error": np.array([f"{self._embeddings.folder}: cannot be written: {error}"])}
        return {"rows": np.array([len(unit)])}


def _name(unit: pa.Table, row: int) -> str:
    """A row of a unit, for people: kind and uid, where it has them; its key, and how its text begins."""
    found = {name: str(unit[name][row].as_py()) for name in (*NAMES, "key_id") if name in unit.column_names}
    key = found.pop("key_id")
    who = " ".join(found.values()) or "a text"
    return f"{who} (key {key}, {str(unit['text'][row].as_py())[:80]!r})"


def stage_encoder(storage: Folder, model: str, section: EncoderSection) -> Folder:
    """Put any encoder (folder or URL, hub name, `package:NAME`) where every node sees it, cut as the section says; to
    as many tokens as it was saved with where the section names none."""
    from raexmc_ray.encoder import TextEncoder

    return stage(storage, TextEncoder.load(model, layers=section.layers, max_tokens=section.max_tokens_given))


def stage(storage: Folder, encoder: TextEncoder) -> Folder:
    """Put an encoder where every node sees it."""
    target = storage / "encoders" / f"given-{encoder.fingerprint[:16]}"
    if (target / STAGED).size() is None:
        with target.filling() as local:
            encoder.save(local)
        (target / STAGED).write(b"")
    return target


def load_encoder(folder: Folder) -> TextEncoder:
    """The encoder that was saved at a folder, local or remote."""
    from raexmc_ray.encoder import TextEncoder

    with Scratch() as scratch:
        return TextEncoder.load(str(folder.local(scratch)))


def quiet_data() -> None:
    """Keep Ray Data's own progress out of the way of our one line, and rows from being dropped in silence."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error reaches the caller, with its cause
    # Both ways to bound an actor's retries are called deprecated in Ray 2.60, and there is no third.
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")


def _bounded_retries() -> dict[str, int]:
    """Options of an actor in a pool. Ray Data would start a crashing one again for ever; this ends the job. The calls
    have no bound of their own: until Ray knows that a node is gone, half a minute, each try to reach an actor there
    would count."""
    return {"max_restarts": 3, "max_task_retries": -1}


def _unit_file(unit: int) -> str:
    return f"unit-{unit:06d}.arrow"
