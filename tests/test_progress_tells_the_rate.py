"""The line of progress tells the speed of this run, whatever was done before it; of what is soon done it may be
silent."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import tiny_settings

from raexmc_ray import progress as progress_module
from raexmc_ray.progress import Progress, said_if_long
from raexmc_ray.recipe import Recipe
from raexmc_ray.train import watch
from raexmc_ray.train.plan import Plan
from raexmc_ray.train.worker import Reporter


def test_what_was_done_before_is_in_the_count_and_not_in_the_rate() -> None:
    now = 0.0
    progress = Progress("train", 5_120_000, "texts")
    progress._bar._time = lambda: now
    progress.begin_at(2_560_000)
    for _ in range(60):
        now += 1
        progress.add(256)
    assert str(progress._bar).startswith("train: 2,575,360 of 5,120,000 texts, 256.00 texts/s, 2:45:40 left")


def test_the_end_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("raexmc_ray.progress.LOG_EVERY_S", -1.0)
    with caplog.at_level("INFO", "raexmc_ray"), Progress("build", 2, "shards") as progress:
        progress.add(1)
        progress.add(1)
    assert re.findall(r"build: \d of \d", caplog.text) == ["build: 1 of 2", "build: 2 of 2"]


@pytest.mark.parametrize("done", [0, 1, 40])
def test_the_first_look_at_a_training_tells_no_rate(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    now = 0.0
    seen = watch.Seen(running=True, begun_at=0, step=done, figures={"epoch": 0.0, "loss": 3.0} if done else {})
    monkeypatch.setattr(watch.ray, "get", lambda reply: reply)
    actor: Any = SimpleNamespace(get=SimpleNamespace(remote=lambda: seen))
    recipe = Recipe.parse({"corpus": {"path": "any"}, "training": {"batch_size": 256}})
    plan: Any = SimpleNamespace(recipe=recipe, steps=1000)
    watcher = watch.Watcher(actor, plan)
    watcher._progress._bar._time = lambda: now
    watcher._show()
    assert str(watcher._progress._bar).startswith(f"train: {done * 256:,} of 256,000 texts, ? texts/s, ? left")
    now, seen.step, seen.figures = 10.0, done + 10, {"epoch": 0.1, "loss": 2.9}
    watcher._show()
    assert f"train: {(done + 10) * 256:,} of 256,000 texts, 256.00 texts/s" in str(watcher._progress._bar)
    assert str(watcher._progress._bar).endswith("epoch=0.1, loss=2.900")


def test_the_end_is_told_with_the_figures_of_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raexmc_ray.train.worker.REPORT_EVERY_S", 60.0)
    told: list[tuple[int, dict[str, float]]] = []
    report = Reporter(lambda *update: told.append(update))
    report(0, {})
    for step in (1, 2):
        report(step, {"epoch": step / 2, "loss": 3.0 - step})
    assert told == [(0, {})], "not of each step"
    assert report.untold == {"epoch": 1.0, "loss": 1.0}
    report(2, {"P@1": 50.0})
    assert told[1:] == [(2, {"epoch": 1.0, "loss": 1.0, "P@1": 50.0})]
    assert not report.untold


@pytest.mark.parametrize("long", [False, True])
def test_what_is_soon_done_may_go_untold(
    long: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_module, "LOG_EVERY_S", 0.0 if long else 60.0)
    with caplog.at_level(logging.INFO), Progress("read", 3, "bytes", if_long=True) as progress:
        progress.add(3)
    assert ("read: 3 of 3 bytes" in caplog.text) == long


@pytest.fixture
def watcher(tmp_path: Path) -> watch.Watcher:
    """Of a training of 100 steps of 32 texts."""
    recipe = Recipe.parse(tiny_settings(tmp_path, tmp_path), ["training.epochs=1", "training.batch_size=32"])
    return watch.Watcher(None, Plan(recipe, instances=3200, steps_an_epoch=100, parameters=1, memory_bytes=1))


def test_a_long_time_without_a_step_is_explained(
    watcher: watch.Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = mock.Mock(return_value=0.0)
    monkeypatch.setattr(watch.time, "monotonic", clock)
    with caplog.at_level(logging.INFO, "raexmc_ray"):
        for second, figures in enumerate([{"mining": 1.0}] * 300 + [{"mining": 0.0}] * 5 + [{"evaluation": 1.0}] * 5):
            clock.return_value = float(second)
            watcher._tell_asides(watch.Seen(running=True, figures=figures))
        watcher._tell_asides(watch.Seen(running=False, figures={"evaluation": 1.0}))
    first, last = caplog.messages
    assert first.startswith("mining: the keys are embedded and searched")
    assert last == "mining took 300 s"


def test_what_takes_long_issaid_if_long(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raexmc_ray.progress.SAY_S", 0.1)
    with caplog.at_level("INFO", logger="raexmc_ray"):
        with said_if_long("soon over"):
            pass
        with said_if_long("takes long"):
            time.sleep(0.5)
        monkeypatch.setattr(Progress, "quiet", True)
        with said_if_long("takes long, quietly"):
            time.sleep(0.5)
    assert caplog.messages == ["takes long"]
