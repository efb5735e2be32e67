"""Ray: embed a corpus, train its index, and write the shards of its memory in parallel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raexmc_ray.cluster import refuse_unplaceable
from raexmc_ray.corpus import Corpus
from raexmc_ray.embed import Embeddings, embed_keys, load_encoder, stage
from raexmc_ray.files import FileEntry, Folder
from raexmc_ray.memory.index import use_threads
from raexmc_ray.memory.plan import build_bytes, training_bytes
from raexmc_ray.memory.write import (
    SnapshotPlan,
    finish_snapshot,
    is_written,
    key_encoder,
    key_table,
    publish_once,
    published_before,
    sample_keys,
    shards_before,
    train,
    trained_before,
    write_shard,
)
from raexmc_ray.progress import Progress, said_if_long
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.published import refuse_altered


def build(recipe: Recipe, corpus: Corpus, encoder: Folder, *, trained: bool = True) -> str:
    """Build and publish the memory of `corpus` at `cluster.storage`/memory; returns the snapshot's id.

    encoder: a folder that every node sees. trained: by this recipe; where it was not, the recipe's training is left out
    of what is recorded. The same recipe, corpus and encoder make the same snapshot: a run that was stopped goes on, and
    one that is finished is only made the current one again. Raises ValueError where no node has room for what must run
    on one, and for a trained encoder that was altered since.
    """
    storage = Folder.at(recipe.cluster.storage)
    table = key_table(corpus)
    given = load_encoder(encoder)
    refuse_altered(encoder, given.fingerprint)
    tower = key_encoder(given, table, recipe.memory)
    plan = SnapshotPlan.of(storage / "memory", corpus, tower, recipe.memory, recipe.prediction)
    with said_if_long(f"looking for the keys of snapshot {plan.id} in what was published before"):
        if published_before(plan, corpus, tower, recipe.prediction):
            return plan.id
    cpus = recipe.cluster.cpus_per_worker
    remedy = "lower cluster.cpus_per_worker"
    more_shards = f", or raise memory.shards ({plan.shards})"
    refuse_unplaceable("what writes a shard", _for_writing(plan, table, cpus), remedy + more_shards)
    fewer_lists = f", or memory.lists ({plan.index.lists})" if plan.index.kind.startswith("ivf") else ""
    refuse_unplaceable("what trains the index", _for_training(plan, cpus), remedy + fewer_lists)
    dtype = np.dtype(np.float32 if plan.index.stores_float32 else np.float16)
    name = f"{tower.fingerprint[:16]}-{corpus.fingerprint[:16]}-{plan.shards}-{dtype.name}"
    embeddings = Embeddings(storage / "embeddings" / name, len(table), plan.shards, dtype.name)
    # With another lexical part than it was given with, or without the one that a memory's encoder has, it is another.
    staged = encoder if tower.fingerprint == given.fingerprint else stage(storage, tower)
    embed_keys(table, staged, embeddings, recipe.encoder, recipe.cluster)
    record = recipe.record()
    if not trained:
        del record["training"]

    def make() -> None:
        shared, shards = write_shards(plan, table, embeddings, cpus)
        finish_snapshot(plan, corpus, tower, shared, shards, recipe.prediction, record)

    return publish_once(plan, make)


def write_shards(
    plan: SnapshotPlan, table: pa.Table, embeddings: Embeddings, cpus: float
) -> tuple[bytes, Iterable[dict[str, FileEntry]]]:
    """Train the index and write those shards that are missing: (what they share, the manifest entries of each).

    table: from `key_table`. cpus: of the task that trains, and of each that writes a shard.
    """
    threads = max(1, int(cpus))
    trained = trained_before(plan)
    if trained is None:
        memory = _for_training(plan, cpus)["memory"]
        with said_if_long(f"training the {plan.index.kind} index that all shards share"):
            trained = _result(_train.options(num_cpus=cpus, memory=memory).remote(plan, embeddings, threads))
    done = shards_before(plan)
    missing = [shard for shard in range(plan.shards) if shard not in done]
    if missing:
        shared = ray.put(trained)
        write = _write_shard.options(num_cpus=cpus, memory=_for_writing(plan, table, cpus)["memory"])
        # Each task gets its own keys: one table for all would be copied whole to every node.
        keys = {shard: ray.put(table.take(np.arange(shard, len(table), plan.shards))) for shard in missing}
        pending = {write.remote(plan, shard, shared, embeddings, keys[shard], threads): shard for shard in missing}
        with Progress("build", plan.shards, "shards", done=len(done)) as progress:
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                shard, entries = pending.pop(ready), _result(ready)
                if not is_written(plan, entries):
                    raise ValueError(
                        f"{plan.folder}: shard {shard} was written by a node whose files are not seen here: set "
                        "cluster.storage to a folder that every node sees"
                    )
                done[shard] = entries
                progress.add(1)
    return trained, done.values()


def _result(task: Any) -> Any:
    """What a task gives, or what it raised itself, without the lines of its process."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _for_training(plan: SnapshotPlan, cpus: float) -> dict[str, float]:
    """What the training reserves, in Ray's words: it sees none of FAISS's memory, and must be told."""
    return {"CPU": cpus, "memory": training_bytes(plan.index)}


def _for_writing(plan: SnapshotPlan, table: pa.Table, cpus: float) -> dict[str, float]:
    """What the writing of a shard reserves."""
    rows = -(-len(table) // plan.shards)
    return {"CPU": cpus, "memory": build_bytes(plan.index, rows, plan.shards, table.nbytes // plan.shards)}


# In a process of its own: the sample comes in small pieces, whose memory malloc keeps for what the process does next.
@ray.remote(max_calls=1)
def _train(plan: SnapshotPlan, embeddings: Embeddings, threads: int) -> bytes:
    use_threads(threads)
    return train(plan, embeddings.take(sample_keys(plan, embeddings.keys)).astype(np.float32))


@ray.remote
def _write_shard(
    plan: SnapshotPlan, shard: int, trained: bytes, embeddings: Embeddings, keys: pa.Table, threads: int
) -> dict[str, FileEntry]:
    """keys: those of the shard."""
    use_threads(threads)
    return write_shard(plan, shard, trained, keys, lambda: embeddings.of_shard(shard))
