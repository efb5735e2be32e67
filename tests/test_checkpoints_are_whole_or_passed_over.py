"""A checkpoint is complete, or it is not resumed from; the newest few stay, and the best."""

from __future__ import annotations

import gc
import json
import logging
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODEL

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.recipe import TrainingSection
from raexmc_ray.train.checkpoint import SEAL, Checkpoints
from raexmc_ray.train.step import make_optimizer


@pytest.fixture
def trained() -> tuple[TextEncoder, torch.optim.Optimizer]:
    encoder = TextEncoder.load(MODEL, layers=1, max_tokens=8)
    optimizer = make_optimizer(encoder, TrainingSection())
    step(encoder, optimizer)
    return encoder, optimizer


def step(encoder: TextEncoder, optimizer: torch.optim.Optimizer) -> None:
    (chunk,) = encoder.chunks(encoder.tokenize(["a text", "another"]), 2)
    encoder(chunk.ids, chunk.mask)[:, 0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(encoder: TextEncoder) -> torch.Tensor:
    return torch.cat([p.detach().ravel() for p in encoder.parameters()])


def test_it_brings_everything_back(trained: tuple, tmp_path: Path) -> None:
    encoder, optimizer = trained
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=2)
    checkpoints.write(7, encoder, optimizer, {"step": 7, "best_step": -1})
    before = weights(encoder)
    step(encoder, optimizer)  # what comes after the call is not in it
    after = weights(encoder)
    checkpoints.wait()
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.state) == (7, {"step": 7, "best_step": -1})
    other = TextEncoder.load(MODEL, layers=1, max_tokens=8)
    restored = make_optimizer(other, TrainingSection())
    found.restore(other, restored)
    assert torch.equal(weights(other), before)
    step(other, restored)
    assert torch.equal(weights(other), after), "the moments are back, too"
    assert torch.equal(weights(TextEncoder.load(found.encoder.path)), before), "an encoder like any other"


def test_what_is_brought_back_does_not_hang_on_the_file(trained: tuple, tmp_path: Path) -> None:
    encoder, optimizer = trained
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=2)
    checkpoints.write(7, encoder, optimizer, {"step": 7, "best_step": -1})
    checkpoints.wait()
    found = checkpoints.latest()
    assert found is not None
    found.restore(encoder, optimizer)
    moments = optimizer.state_dict()["state"].values()
    gc.collect()  # of the encoder that was read
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps, "no map of it is left"
    assert all(moment["exp_avg_sq"].any() for moment in moments)


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(
    trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = Folder.remove

    def fail(folder: Folder) -> None:
        if folder.name == "step-00000001":
            raise OSError("Directory not empty")
        remove(folder)

    checkpoints = Checkpoints(Folder.at(tmp_path), keep=1)
    checkpoints.write(1, *trained, {"step": 1, "best_step": -1})
    checkpoints.wait()
    monkeypatch.setattr(Folder, "remove", fail)
    for number in (2, 3):
        checkpoints.write(number, *trained, {"step": number, "best_step": -1})
    checkpoints.wait()
    assert "step-00000001: this old checkpoint could not be deleted (Directory not empty)" in caplog.text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000003"]
    assert checkpoints.open(1) is None, "it is not whole"


def test_what_is_torn_or_altered_is_passed_over(
    trained: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=9)
    for number in (1, 2):
        checkpoints.write(number, *trained, {"step": number, "best_step": -1})
    checkpoints.wait()
    newest = tmp_path / "step-00000002"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert {"model.safetensors", "optimizer.safetensors", "state.json", SEAL} <= {path.name for path in files}
    assert not any(path.suffix in {".pkl", ".pt", ".bin", ".pickle"} for path in files), "no pickle"
    for path in files:
        whole = path.read_bytes()
        altered = whole[:-1] + bytes([whole[-1] ^ 1])
        for damage in (whole[: len(whole) // 2], altered, None):
            if path.name == SEAL and damage == altered:
                continue  # its last byte is a brace: no JSON without it
            path.unlink() if damage is None else path.write_bytes(damage)
            with caplog.at_level(logging.WARNING):
                found = checkpoints.latest()
            assert found is not None
            assert found.step == 1, path
            if not (path.name == SEAL and damage is None):
                assert "step-00000002" in caplog.text
            caplog.clear()
        path.write_bytes(whole)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 2
    (tmp_path / "step-00000001" / SEAL).unlink()
    (newest / SEAL).write_text(json.dumps({"files": {}})[:-1])
    assert checkpoints.latest() is None


def test_what_cannot_be_read_now_is_not_damaged(trained: tuple, tmp_path: Path) -> None:
    """The run would begin again from an older one, and later delete this one and the best that it names."""
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=1)
    for number in (1, 2):
        checkpoints.write(number, *trained, {"step": number, "best_step": 1})
        checkpoints.wait()
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        checkpoints.open(2)
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        checkpoints._best_of(2)
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, checkpoints.steps()) == (2, [1, 2])


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_newest_and_the_best_stay(trained: tuple, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=2)
    for number in range(1, 6):
        checkpoints.write(number, *trained, {"step": number, "best_step": 2 if number >= 2 else 1})
    checkpoints.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{n:08d}" for n in (2, 4, 5)]


def test_the_best_of_each_that_stays_stays_with_it(trained: tuple, tmp_path: Path) -> None:
    """A new best at step 5, whose checkpoint is damaged then: the run goes on from 4, whose best was 2."""
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=2)
    for number, best in ((2, 2), (3, 2), (4, 2), (5, 5)):
        checkpoints.write(number, *trained, {"step": number, "best_step": best})
    checkpoints.wait()
    (tmp_path / "step-00000005" / "state.json").write_text("{}")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 4
    assert checkpoints.open(found.state["best_step"]) is not None


@pytest.mark.parametrize("damage", ["torn", "altered"])
def test_what_is_not_whole_does_not_count_among_the_newest(damage: str, trained: tuple, tmp_path: Path) -> None:
    """A run whose checkpoint 10 is lost goes on from 5; asked for more checkpoints from now on, it writes 7 first."""
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=1)
    for number in (10, 5):
        checkpoints.write(number, *trained, {"step": number, "best_step": 10})
    checkpoints.wait()
    if damage == "torn":
        (tmp_path / "step-00000010" / SEAL).unlink()
    else:
        (tmp_path / "step-00000010" / "state.json").write_text("{}")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 5
    checkpoints.write(7, *trained, {"step": 7, "best_step": -1})
    checkpoints.wait()
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"], "and nothing of a life that is over"


def test_training_does_not_wait_for_it(trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    save = TextEncoder.save

    def slow_save(*arguments: Any) -> None:
        assert gate.wait(60)
        save(*arguments)

    monkeypatch.setattr(TextEncoder, "save", slow_save)
    checkpoints = Checkpoints(Folder.at(tmp_path), keep=2)
    checkpoints.write(1, *trained, {"step": 1, "best_step": -1})
    assert checkpoints.latest() is None, "the call is back before the checkpoint is there"
    gate.set()
    checkpoints.wait()
    assert checkpoints.latest() is not None


def test_a_write_that_fails_is_an_error(trained: tuple, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints = Checkpoints(Folder.at(tmp_path / "checkpoints"), keep=2)
    checkpoints.write(1, *trained, {"step": 1, "best_step": -1})
    with pytest.raises(OSError):
        checkpoints.wait()
