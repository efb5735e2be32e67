"""A training worker that is killed in mid-run costs time, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import tiny_settings
from safetensors.numpy import load_file

from raexmc_ray.corpus import read_corpus
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.trainer import train, trained_encoder

pytestmark = pytest.mark.ray


def test_the_encoder_is_published_and_not_trained_twice(tiny_run: Recipe) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    started = time.monotonic()
    assert train(tiny_run, corpus) == trained_encoder(tiny_run, corpus)
    assert time.monotonic() - started < 5
    other = Recipe.parse(tiny_run.model_dump(by_alias=True), ["training.seed=1"])
    with pytest.raises(FileNotFoundError, match="raexmc train"):
        trained_encoder(other, corpus)


@pytest.mark.faults
def test_a_killed_worker_changes_nothing_in_the_result(tiny_run: Recipe, tmp_path: Path) -> None:
    recipe = Recipe.parse(tiny_settings(Path(tiny_run.corpus.path), tmp_path))
    checkpoints = tmp_path / "checkpoints"
    killed: list[int] = []

    def kill_after_the_first_checkpoint() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if list(checkpoints.rglob("state.json")):
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_after_the_first_checkpoint)
    killer.start()
    encoder = train(recipe, read_corpus(recipe.corpus.path))
    killer.join()
    assert killed, "the test must kill a worker"
    undisturbed = trained_encoder(tiny_run, read_corpus(tiny_run.corpus.path))
    weights, expected = (load_file(Path(folder.path) / "model.safetensors") for folder in (encoder, undisturbed))
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in weights), "bit for bit"


def test_a_run_killed_before_its_encoder_was_published_only_publishes_it(tiny_run: Recipe) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    folder = Path(trained_encoder(tiny_run, corpus).path)
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert Path(train(tiny_run, corpus).path) == folder
    assert (folder / "model.safetensors").read_bytes() == weights


def test_checkpoints_hold_no_pickle(tiny_run: Recipe) -> None:
    folder = Path((Folder.at(tiny_run.cluster.storage) / "checkpoints").path)
    checkpoints = [path.parent for path in folder.rglob("state.json")]
    assert checkpoints, "a checkpoint at each epoch"
    names = {path.name for path in checkpoints[0].rglob("*") if path.is_file()}
    assert {"optimizer.safetensors", "model.safetensors", "state.json"} <= names
    assert not any(Path(name).suffix in {".pkl", ".pt", ".bin", ".pickle"} for name in names)
