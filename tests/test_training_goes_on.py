"""A training whose worker, driver or node is killed costs time, and nothing else. With real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from conftest import ROOT, tiny_settings
from helpers import MODEL
from safetensors.numpy import load_file

from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import load_encoder
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import build
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.checkpoint import SEAL
from raexmc_ray.train.trainer import LOCK, train, trained_encoder

pytestmark = pytest.mark.ray
CHECKPOINTS = {"checkpoint_every": 2}
AT_START = signal.getsignal(signal.SIGINT)
"""Before any training; that of a shell's background job ignores it."""


def test_the_encoder_is_published_and_not_trained_twice(tiny_run: Recipe) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    started = time.monotonic()
    assert train(tiny_run, corpus) == trained_encoder(tiny_run, corpus)
    assert time.monotonic() - started < 5
    other = Recipe.parse(tiny_run.model_dump(by_alias=True), ["training.seed=1"])
    with pytest.raises(FileNotFoundError, match="raexmc train"):
        trained_encoder(other, corpus)


def test_workers_start_from_the_encoder_that_the_driver_read(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work in another folder, where this name is none."""
    TextEncoder.load(MODEL, layers=1, max_tokens=16).save(tmp_path / "models/mine")
    monkeypatch.chdir(tmp_path)
    overrides = ["encoder.model=models/mine", "cluster.max_failures=0"]
    recipe = Recipe.parse(tiny_settings(Path(tiny_run.corpus.path), tmp_path / "run"), overrides)
    corpus = read_corpus(recipe.corpus.path)
    assert same_weights(train(recipe, corpus), trained_encoder(tiny_run, corpus)), "it is the same encoder"


@pytest.mark.slow
def test_a_run_killed_before_its_encoder_was_published_only_publishes_it(tiny_run: Recipe) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    folder = Path(trained_encoder(tiny_run, corpus).path)
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert Path(train(tiny_run, corpus).path) == folder
    assert (folder / "model.safetensors").read_bytes() == weights


def test_no_memory_is_built_with_a_trained_encoder_that_was_altered(tiny_run: Recipe, tmp_path: Path) -> None:
    corpus = read_corpus(tiny_run.corpus.path)
    folder = Folder.at(tmp_path / "encoder")
    shutil.copytree(trained_encoder(tiny_run, corpus).path, folder.path)
    encoder = load_encoder(folder)
    with torch.no_grad():
        encoder.words[0, 0] += 1
    encoder.save(folder.path)
    with pytest.raises(ValueError, match=r"encoder/trained\.json: .* remove .*encoder, and `raexmc train`"):
        build(tiny_run, corpus, folder)


def test_an_interrupt_means_after_the_training_what_it_meant_before(tiny_run: Recipe) -> None:
    assert signal.getsignal(signal.SIGINT) is AT_START


def test_a_run_leaves_its_curves_and_picture(tiny_run: Recipe) -> None:
    (run,) = (Path(tiny_run.cluster.storage) / "training").iterdir()
    lines = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 14
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def same_weights(folder: Folder, other: Folder) -> bool:
    """Bit for bit."""
    one, two = (load_file(Path(f.path) / "model.safetensors") for f in (folder, other))
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def after_first_checkpoint(storage: Path, kill: Callable[[], bool]) -> threading.Thread:
    """A started thread that calls `kill` once the run has a checkpoint, until it says that it killed."""

    def watch() -> None:
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            if list(storage.rglob(SEAL)) and kill():
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.faults
def test_a_killed_worker_changes_nothing_in_the_result(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said: that it was lost, that a new one is waited for, and where the training starts again."""
    monkeypatch.setattr("raexmc_ray.train.watch.BUSY_S", 0.0)
    settings = tiny_settings(Path(tiny_run.corpus.path), tmp_path)
    settings["cluster"] |= CHECKPOINTS
    recipe = Recipe.parse(settings)
    killed: list[int] = []

    def kill() -> bool:
        for process in workers_of(psutil.Process())[:1]:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
        return bool(killed)

    killer = after_first_checkpoint(tmp_path, kill)
    encoder = train(recipe, read_corpus(recipe.corpus.path))
    killer.join()
    assert killed, "the test must kill a worker"
    said = [
        r"worker \d failed \(\w+: .*\): the workers start again",
        "no worker has begun again",
        "again from step [1-9]",
    ]
    assert re.search(".*".join(said), caplog.text, re.DOTALL), caplog.text
    assert same_weights(encoder, trained_encoder(tiny_run, read_corpus(tiny_run.corpus.path)))


@pytest.mark.faults
def test_a_killed_driver_goes_on_by_the_same_command(tiny_run: Recipe, ray_cluster: str, tmp_path: Path) -> None:
    settings = tiny_settings(Path(tiny_run.corpus.path), tmp_path / "run")
    settings["cluster"] |= CHECKPOINTS
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "raexmc_ray.cli", "train", "--recipe", str(recipe)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)

    def kill() -> bool:
        driver.send_signal(signal.SIGKILL)
        return True

    after_first_checkpoint(tmp_path, kill).join()
    assert driver.wait(timeout=60) == -signal.SIGKILL, "the test must kill the driver"
    assert not list(tmp_path.rglob("trained.json"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert again.returncode == 0, again.stdout + again.stderr
    loaded = Recipe.load(recipe)
    encoder = trained_encoder(loaded, read_corpus(loaded.corpus.path))
    assert same_weights(encoder, trained_encoder(tiny_run, read_corpus(tiny_run.corpus.path)))


@pytest.mark.faults
def test_two_commands_do_not_train_the_same_run(tiny_run: Recipe, ray_cluster: str, tmp_path: Path) -> None:
    settings = tiny_settings(Path(tiny_run.corpus.path), tmp_path / "run", workers=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    loaded = Recipe.load(recipe)
    corpus = read_corpus(loaded.corpus.path)
    command = [sys.executable, "-m", "raexmc_ray.cli", "train", "--recipe", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as other:
        deadline = time.monotonic() + 150
        while not list(tmp_path.rglob(LOCK)):
            assert other.poll() is None, "it trains"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ValueError, match=r"another command is training this recipe .*/training/"):
            train(loaded, corpus)
        other.kill()
    assert Path(train(loaded, corpus).path).exists(), "the lock went with its holder"


def test_a_busy_cluster_is_named(
    tiny_run: Recipe,
    ray_cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another job has three of four CPUs until the warning is there; then the training runs."""
    monkeypatch.setattr("raexmc_ray.train.watch.BUSY_S", 2.0)
    settings = tiny_settings(Path(tiny_run.corpus.path), tmp_path, workers=1)
    recipe = Recipe.parse(settings, ["cluster.cpus_per_worker=2"])
    corpus = read_corpus(recipe.corpus.path)
    holder = Holder.options(num_cpus=3).remote()
    ray.get(holder.__ray_ready__.remote())
    training = threading.Thread(target=train, args=(recipe, corpus), daemon=True)
    training.start()
    try:
        deadline = time.monotonic() + 100
        while "no worker has begun after 2 s; the cluster has" not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.1)
    finally:
        ray.kill(holder)
    training.join()
    assert trained_encoder(recipe, corpus)


@ray.remote
class Holder:
    """Holds what it is given."""


@pytest.mark.faults
def test_a_killed_node_changes_nothing_in_the_result(tiny_run: Recipe, tmp_path: Path) -> None:
    """A cluster of its own, of a head and two nodes; one of the nodes with a worker dies, another one joins."""
    settings = tiny_settings(Path(tiny_run.corpus.path), tmp_path / "run")
    settings["cluster"] |= CHECKPOINTS
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/lose_a_node.py"), "train", str(recipe)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed a node" in done.stdout
    loaded = Recipe.load(recipe)
    encoder = trained_encoder(loaded, read_corpus(loaded.corpus.path))
    assert same_weights(encoder, trained_encoder(tiny_run, read_corpus(tiny_run.corpus.path)))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_not_tried_again(tiny_run: Recipe, tmp_path: Path) -> None:
    settings = tiny_settings(Path(tiny_run.corpus.path), tmp_path / "run", workers=1)
    settings["training"] |= {"learning_rate": 1e30, "warmup": 0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "raexmc_ray.cli", "train", "--recipe", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "not finite in step 2" in done.stderr
    (file,) = tmp_path.rglob("broken-batch.json")
    assert f"uids of the batch: {file.read_text()}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob(SEAL)), "no checkpoint"
    (curves,) = tmp_path.rglob("curves.jsonl")
    assert json.loads(curves.read_text().splitlines()[0])["step"] == 1, "what led there"


def test_a_folder_that_the_workers_do_not_see_is_said_before_the_first_step(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(run: Folder) -> str:
        (run / "encoders").remove()  # nor the encoder that they start from
        return "left on another node"

    monkeypatch.setattr("raexmc_ray.train.trainer._leave_mark", elsewhere)
    recipe = Recipe.parse(tiny_settings(Path(tiny_run.corpus.path), tmp_path / "run"))
    with pytest.raises(ValueError, match=r"2 of 2 workers do not see .*: set cluster\.storage to a folder that every"):
        train(recipe, read_corpus(recipe.corpus.path))
    assert not list(tmp_path.rglob("curves.jsonl"))
