"""Ray: the driver follows the workers: how far they are, what they wait for, why one was lost, what ends the run.

Light, for Ray Train's controller imports it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.train import TrainingFailedError, UserCallback

from raexmc_ray.progress import Progress
from raexmc_ray.train.errors import WorkersFailedError

if TYPE_CHECKING:
    from raexmc_ray.train.plan import Plan

POLL_S = 0.5
BUSY_S = 30.0
"""Until it is said that no worker has begun, or begun again: they import torch for a part of it."""
ASIDES = ("mining", "evaluation")
"""Figures of what no step is taken during: 1 while it goes on, 0 when it is done."""
ASIDE_S = 10.0
"""Until it is said that one goes on."""
LONGEST_CAUSE = 400
"""Letters of a worker's error that are told."""
logger = logging.getLogger("raexmc_ray")


@dataclass
class Seen:
    """What is known of the workers."""

    running: bool = False
    """They have begun, and none has been lost since."""
    begun_at: int | None = None
    """Steps that were done when they began; None while they prepare for it."""
    step: int = 0
    """Steps done."""
    figures: dict[str, float] = field(default_factory=dict)
    """The last value of each."""
    failures: int = 0
    failure: str = ""
    """The last of them, in one line."""
    stopped: Exception | None = None
    """Why the run cannot go on."""


@ray.remote(num_cpus=0)
class ProgressActor:
    """Where the workers and Ray Train's controller say what happens, and the driver reads it."""

    def __init__(self) -> None:
        self._seen = Seen()

    def begin(self) -> None:
        """There was room for the workers. Said by the first of them, at each start.

        What a worker of an earlier start said of the run came too late to end it, and may have been that start's.
        """
        self._seen.running, self._seen.begun_at, self._seen.stopped = True, None, None
        self._seen.figures |= dict.fromkeys(ASIDES, 0.0)

    def update(self, step: int, figures: dict[str, float]) -> None:
        """So many steps are done; first of all, those that are done as the training begins."""
        if self._seen.begun_at is None:
            self._seen.begun_at = step
        self._seen.step = step
        self._seen.figures |= figures

    def fail(self, failure: str) -> Exception | None:
        """A worker was lost; why the run cannot go on, if it cannot."""
        if self._seen.running or failure != self._seen.failure:  # else it is said again while the others are waited for
            self._seen.failures += 1
        self._seen.running, self._seen.failure = False, failure
        return self._seen.stopped

    def stop(self, error: Exception) -> None:
        """The run cannot go on. Of several that say so in a start, the first counts."""
        self._seen.stopped = self._seen.stopped or error

    def get(self) -> Seen:
        return self._seen


class Failures(UserCallback):
    """Tells of a worker that failed, and ends a run that cannot go on: Ray Train, whose controller calls this, would
    start again, and say nothing."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        stopped = ray.get(self._progress.fail.remote(say_failure(worker_exceptions)))
        if stopped:
            raise stopped  # what a callback raises is not tried again


def say_failure(failures: Mapping[int, Exception]) -> str:
    """Of those failures, by rank, that happened at a time, the one that tells the most, in one line."""
    # Where one is lost, the others lose their connection to it.
    rank = min(failures, key=lambda rank: (not hasattr(failures[rank], "health_check_failure"), rank))
    return f"worker {rank} failed ({_in_a_line(failures[rank])})"


def workers_failed(error: TrainingFailedError, max_failures: int) -> WorkersFailedError:
    """What Ray Train gave up for, in one line."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if failures:
        said = f"cluster.max_failures is {max_failures}, and {say_failure(failures)}"
    else:
        said = f"Ray Train ended it ({_in_a_line(getattr(error, 'controller_failure', error))})"
    return WorkersFailedError(f"training stopped: {said}. The same command goes on from the last checkpoint")


def _in_a_line(error: Exception) -> str:
    lost = getattr(error, "health_check_failure", None)
    # Of a lost process Ray says the cause last, and what process it was before.
    lines = str(lost or error).strip().splitlines() or [""]
    return f"{type(lost or error).__name__}: {lines[-1 if lost else 0].strip()[:LONGEST_CAUSE]}"


class Watcher:
    """Shows a ProgressActor's state on one line, in a thread, while in use."""

    def __init__(self, actor: Any, plan: Plan) -> None:
        self._actor, self._plan = actor, plan
        self._metric = plan.recipe.training.evaluation.metric
        self._batch = plan.recipe.training.batch_size
        self._progress = Progress("train", plan.steps * self._batch, "texts")
        self._end = threading.Event()
        self._shown: int | None = None
        self._told_time = self._told_start = False
        self._failures, self._max_failures = 0, plan.recipe.cluster.max_failures
        self._busy_at = time.monotonic() + BUSY_S
        self._aside, self._aside_since, self._told_aside = "", 0.0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.stopped: Exception | None = None

    def __enter__(self) -> Watcher:
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        self._thread.join()
        if error[0] is None or issubclass(error[0], TrainingFailedError):
            self._show()
        self._progress.__exit__(*error)
        ray.kill(self._actor)

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            self._show()

    def _show(self) -> None:
        seen: Seen = ray.get(self._actor.get.remote())
        self.stopped = seen.stopped
        self._tell_starts(seen)
        self._tell_asides(seen)
        step, figures = seen.step, seen.figures
        if not self._told_time and "seconds_per_step" in figures:
            self._told_time = True
            seconds = figures["seconds_per_step"]
            hours = (self._plan.steps - step) * seconds / 3600
            training = self._plan.recipe.training
            beside = ["mining"] * training.mining.on + ["evaluation"] * (training.evaluation.every > 0)
            speed = f"{self._batch / seconds:.0f} texts/s" + f", beside {' and '.join(beside)}" * bool(beside)
            logger.info("time        about %.2f hours more, at %s", hours, speed)
        if seen.begun_at is None or (self._shown is not None and step <= self._shown):
            return
        if self._shown is None:  # steps that were done when we first look took none of the time that we know of
            self._shown = step
            self._progress.begin_at(step * self._batch)
        fields = {}
        if "loss" in figures:
            fields = {"epoch": f"{figures['epoch']:.1f}", "loss": f"{figures['loss']:.3f}"}
        if self._metric in figures:
            fields[f"held-out {self._metric}"] = f"{figures[self._metric]:.1f}"
        self._progress.add((step - self._shown) * self._batch, **fields)
        self._shown = step

    def _tell_starts(self, seen: Seen) -> None:
        """Say where the workers begin, that one was lost, and that they are waited for: Ray Train does not."""
        if seen.failures > self._failures:
            self._failures, self._told_start, self._busy_at = seen.failures, False, time.monotonic() + BUSY_S
            if not seen.stopped and (self._max_failures < 0 or seen.failures <= self._max_failures):
                logger.warning("%s: the workers start again, from the last checkpoint", seen.failure)
        if not seen.running and time.monotonic() > self._busy_at:
            self._busy_at = math.inf
            self._say_busy()
        if seen.running and seen.begun_at is not None and not self._told_start:
            self._told_start = True
            if self._failures:
                logger.warning("training started again from step %s", f"{seen.begun_at:,}")
            elif seen.begun_at:
                logger.info("training goes on from step %s", f"{seen.begun_at:,}")

    def _tell_asides(self, seen: Seen) -> None:
        """Say what a long time without a step is for, and how long it took."""
        if not seen.running:
            self._aside = ""
            return
        now = next((name for name in ASIDES if seen.figures.get(name)), "")
        if now != self._aside:
            if self._aside and self._told_aside:
                logger.info("%s took %.0f s", self._aside, time.monotonic() - self._aside_since)
            self._aside, self._aside_since, self._told_aside = now, time.monotonic(), False
        elif now and not self._told_aside and time.monotonic() - self._aside_since > ASIDE_S:
            self._told_aside = True
            logger.info("%s: the keys are embedded and searched, and no step is taken until that is done", now)

    def _say_busy(self) -> None:
        there, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]  # Ray's
        kinds = ["CPU", "GPU"] if self._plan.recipe.cluster.gpu else ["CPU"]
        said = " and ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}" for kind in kinds)
        logger.warning(
            "no worker has begun%s after %.0f s; the cluster has %s free now: they are still starting, or wait for "
            "room, or for a node to come back",
            " again" if self._failures else "",
            BUSY_S,
            said,
        )
