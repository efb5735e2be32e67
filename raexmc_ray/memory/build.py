"""Ray: embed a corpus, and write the shards of its memory in parallel."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raexmc_ray.corpus import Corpus
from raexmc_ray.embed import embed_keys, read_shard
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import FileEntry, Folder
from raexmc_ray.memory.snapshot import publish_current
from raexmc_ray.memory.write import SnapshotPlan, finish_snapshot, key_table, value_lists, write_shard
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import Recipe

STAGED = "staged"
"""Written into the folder of a given encoder once all of it is there."""


def build(recipe: Recipe, corpus: Corpus, encoder: Folder) -> str:
    """Build and publish the memory of `corpus` at `cluster.storage`/memory; returns the snapshot's id.

    encoder: a folder that every node sees. The same recipe, corpus and encoder make the same snapshot: a run
    that was stopped goes on, and one that is finished is only made the current one again.
    """
    storage = Folder.at(recipe.cluster.storage)
    tower = TextEncoder.load(encoder.path)
    defaults = recipe.prediction.model_dump_json(by_alias=True)
    plan = SnapshotPlan.of(storage / "memory", corpus, tower.fingerprint, recipe.memory, defaults)
    if plan.is_complete:
        publish_current(plan.memory, plan.id)
        return plan.id
    table = key_table(corpus)
    embeddings = storage / "embeddings" / f"{tower.fingerprint[:16]}-{corpus.fingerprint[:16]}-{plan.shards}"
    embed_keys(table, encoder, embeddings, plan.shards, recipe.encoder, recipe.cluster)
    keys = ray.put((table, value_lists(corpus.train.relevance)))
    pending = [_write_shard.remote(plan, shard, embeddings, keys) for shard in range(plan.shards)]
    entries: dict[str, FileEntry] = {}
    with Progress("build", plan.shards, "shards") as progress:
        while pending:
            (ready,), pending = ray.wait(pending, num_returns=1)
            entries |= ray.get(ready)
            progress.add(1)
    settings: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    finish_snapshot(plan, corpus, tower, entries, recipe.memory, recipe.prediction, settings)
    return plan.id


@ray.remote
def _write_shard(
    plan: SnapshotPlan, shard: int, embeddings: Folder, keys: tuple[pa.Table, pa.LargeListArray]
) -> dict[str, FileEntry]:
    table, values = keys
    mine = np.arange(shard, len(table), plan.shards)
    parts = list(read_shard(embeddings, shard, len(table)))
    assert np.array_equal(np.concatenate([ids for ids, _ in parts]), mine), "every key is embedded exactly once"
    keys_ND = np.concatenate([vectors for _, vectors in parts])
    return write_shard(plan, shard, keys_ND, table.take(mine), values.take(pa.array(mine)))


def stage_encoder(recipe: Recipe, model: str) -> Folder:
    """Put any encoder (folder, hub name, `package:NAME`), cut as the recipe says, where every node sees it."""
    tower = TextEncoder.load(model, layers=recipe.encoder.layers, max_tokens=recipe.encoder.max_tokens)
    target = Folder.at(recipe.cluster.storage) / "encoders" / f"given-{tower.fingerprint[:16]}"
    if (target / STAGED).size() is None:
        with tempfile.TemporaryDirectory() as scratch:
            tower.save(scratch)
            target.upload(Path(scratch))
        (target / STAGED).write(b"")
    return target
