"""What actors answer is what one process answers, to the bit; a killed shard comes back."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
from conftest import tiny_settings
from helpers import tiny_encoder

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import stage
from raexmc_ray.evaluation import evaluate
from raexmc_ray.files import Folder
from raexmc_ray.lexical import Lexical
from raexmc_ray.memory.build import build
from raexmc_ray.memory.pool import ShardActor, ShardPool, ShardUnavailableError, open_in_actors
from raexmc_ray.memory.snapshot import SnapshotError, open_snapshot
from raexmc_ray.recipe import Neighbours, Recipe
from raexmc_ray.train.trainer import trained_encoder

pytestmark = pytest.mark.ray


def memory_of(recipe: Recipe) -> Folder:
    return Folder.at(recipe.cluster.storage) / "memory"


@pytest.mark.parametrize("neighbours", [Neighbours(joint=100), Neighbours(instances=30, labels=50)])
def test_actors_and_one_process_give_the_same_answers(tiny_run: Recipe, neighbours: Neighbours) -> None:
    local = raexmc_ray.open(memory_of(tiny_run).path)
    corpus = read_corpus(tiny_run.corpus.path)
    texts = corpus.test.texts["text"].to_pylist()
    memory, pool = open_in_actors(memory_of(tiny_run))
    with pool:
        expected = local.predict(texts, k=10, neighbours=neighbours, evidence=3)
        assert memory.predict(texts, k=10, neighbours=neighbours, evidence=3) == expected
    assert all(len(labels) == 10 for labels in expected)


def test_the_table_has_its_rows_and_the_memory_learns(tiny_run: Recipe) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    memory, pool = open_in_actors(memory_of(tiny_run))
    with pool:
        table = evaluate(memory, corpus, tiny_run.corpus, tiny_run.prediction).table
    assert list(table) == ["popularity", "labels only", "instances only", "both"]
    assert table["both"]["R@100"] > table["popularity"]["R@100"]
    assert all(0 <= figure <= 100 for row in table.values() for figure in row.values())


def test_building_again_makes_the_same_snapshot_and_embeds_only_what_is_missing(tiny_run: Recipe) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    encoder = trained_encoder(tiny_run, corpus)
    before = raexmc_ray.open(memory_of(tiny_run).path)
    again = Recipe.parse(tiny_run.model_dump(by_alias=True), ["memory.index=factory:Flat"])
    units = Folder.at(tiny_run.cluster.storage) / "embeddings"
    (folder,) = units.names()
    (unit,) = (name for name in (units / folder).names() if name.startswith("unit-"))
    path = f"{units.path}/{folder}/{unit}"
    with open(path, "rb") as file:
        content = file.read()
    os.remove(path)
    assert build(tiny_run, corpus, encoder) == before.manifest.id
    assert not os.path.exists(path), "a finished snapshot is not embedded again"
    assert build(again, corpus, encoder) != before.manifest.id
    with open(path, "rb") as file:
        assert file.read() == content, "the same texts give the same embeddings, to the bit"
    after = raexmc_ray.open(memory_of(tiny_run).path, before.manifest.id)
    queries = before.encoder.encode(["an editor"])
    for name in ("key_ids_Bb", "scores_Bb"):
        found = [getattr(m.search(queries, Neighbours(joint=50)), name) for m in (before, after)]
        assert np.array_equal(*found)
    assert build(tiny_run, corpus, encoder) == before.manifest.id


def test_the_encoder_of_a_memory_with_a_lexical_part_makes_one_without(
    ray_cluster: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus, recipe = read_corpus(tiny_corpus), Recipe.parse(tiny_settings(tiny_corpus, tmp_path))
    given = tiny_encoder().with_lexical(Lexical.fit(["a text editor"], dimension=32, weight=0.3))
    name = build(recipe, corpus, stage(Folder.at(tmp_path), given), trained=False)
    assert name == raexmc_ray.build(corpus, given, tmp_path / "local", recipe.memory, recipe.prediction)
    memory = raexmc_ray.open(memory_of(recipe).path)
    assert memory.encoder.dimension == memory.manifest.dimension == given.width
    assert len(memory.predict(["a text editor"], k=3)[0]) == 3


@pytest.mark.faults
def test_a_killed_shard_comes_back_and_the_answer_is_whole(tiny_run: Recipe) -> None:
    memory, pool = open_in_actors(memory_of(tiny_run))
    with pool:
        queries = memory.encoder.encode(["a text editor", "a compiler"])
        before = memory.search(queries, Neighbours(joint=100))
        victim = ray.get(pool.actors[1].pid.remote())
        os.kill(victim, signal.SIGKILL)
        after = memory.search(queries, Neighbours(joint=100))
        assert np.array_equal(before.key_ids_Bb, after.key_ids_Bb)
        assert np.array_equal(before.scores_Bb, after.scores_Bb)
        assert ray.get(pool.actors[1].pid.remote()) != victim


def with_altered_shard(memory: Path, folder: Path, shard: int) -> Path:
    """A copy of the memory in which a bit of a shard's last file is another one."""
    shutil.copytree(memory, folder)
    file = sorted(folder.rglob(f"shard-{shard:04}/*"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return folder


def test_an_altered_shard_is_refused_by_the_name_of_its_file(
    small_memory: Path, tmp_path: Path, ray_cluster: str
) -> None:
    altered = with_altered_shard(small_memory, tmp_path / "memory", 1)
    with pytest.raises(SnapshotError, match=r"shard-0001/.*: its sha256 is not the manifest's") as caught:
        open_in_actors(Folder.at(altered))
    assert "Traceback" not in str(caught.value)


@pytest.mark.faults
def test_a_shard_that_is_killed_before_it_was_verified_is_verified_all_the_same(
    small_memory: Path, tmp_path: Path, ray_cluster: str
) -> None:
    altered = Folder.at(with_altered_shard(small_memory, tmp_path / "memory", 1))
    actor = ShardActor.remote(altered, open_snapshot(altered).manifest.id, 1, 1, False)
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    with pytest.raises(SnapshotError, match="its sha256 is not the manifest's"):
        ray.get(actor.verify.remote())
    ray.kill(actor)


@pytest.mark.faults
def test_a_shard_that_does_not_answer_in_time_is_named(tiny_run: Recipe) -> None:
    memory, pool = open_in_actors(memory_of(tiny_run))
    with pool:
        queries = memory.encoder.encode(["a text editor"])
        before = memory.search(queries, Neighbours(joint=100))
        process = ray.get(pool.actors[2].pid.remote())
        patience, pool.timeout_s = pool.timeout_s, 1.0
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(ShardUnavailableError, match=r"shards \[2\] did not answer within 1 s"):
                memory.search(queries, Neighbours(joint=100))
        finally:
            os.kill(process, signal.SIGCONT)
        pool.timeout_s = patience
        assert np.array_equal(memory.search(queries, Neighbours(joint=100)).key_ids_Bb, before.key_ids_Bb)


def test_shards_that_have_no_room_are_refused_at_once(tiny_run: Recipe) -> None:
    snapshot = open_snapshot(memory_of(tiny_run))
    with pytest.raises(ValueError, match=r"a shard's actor wants 3 CPU and .* room for 1 of 3: .*memory\.shards"):
        ShardPool(memory_of(tiny_run), snapshot, cpus=3)
    with pytest.raises(ValueError, match=r"wants .* and 1 GPU on one node, .* 0 GPU: "):
        ShardPool(memory_of(tiny_run), snapshot, gpu=True)
