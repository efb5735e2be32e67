"""Ray: the driver follows the workers: how far they are, what they wait for, why one was lost, what ends the run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import TrainingFailedError, UserCallback

from raexmc_ray.progress import Progress
from raexmc_ray.train.errors import WorkersFailedError
from raexmc_ray.train.plan import Plan

POLL_S = 0.5
BUSY_S = 30.0
"""Until it is said that no worker has begun: they import torch for a part of it."""
LONGEST_CAUSE = 400
"""Letters of a worker's error that are told."""
logger = logging.getLogger("raexmc_ray")


@ray.remote(num_cpus=0)
class ProgressActor:
    """Where the first worker says how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self._begun, self._step = False, 0
        self._figures: dict[str, float] = {}
        self._stopped: Exception | None = None

    def begin(self) -> None:
        """There was room for the workers."""
        self._begun = True

    def update(self, step: int, figures: dict[str, float]) -> None:
        self._step = step
        self._figures |= figures

    def stop(self, error: Exception) -> None:
        """The run cannot go on. Of several that say so, the first counts."""
        self._stopped = self._stopped or error

    def get(self) -> tuple[bool, int, dict[str, float], Exception | None]:
        """(whether it has begun, steps done, the last value of each figure, why the run cannot go on)."""
        return self._begun, self._step, self._figures, self._stopped


class Failures(UserCallback):
    """Ends a run that cannot go on when a worker fails: Ray Train, whose controller calls this, would start again."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        *_, stopped = ray.get(self._progress.get.remote())
        if stopped:
            raise stopped  # what a callback raises is not tried again


def workers_failed(error: TrainingFailedError, max_failures: int) -> WorkersFailedError:
    """What Ray Train gave up for, in one line."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if failures:
        # Where one is lost, the others lose their connection to it.
        rank = min(failures, key=lambda rank: (not hasattr(failures[rank], "health_check_failure"), rank))
        said = f"cluster.max_failures is {max_failures}, and worker {rank} failed again ({_in_a_line(failures[rank])})"
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
        self._told_time = False
        self._busy_at = time.monotonic() + BUSY_S
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
        begun, step, figures, self.stopped = ray.get(self._actor.get.remote())
        if not begun and time.monotonic() > self._busy_at:
            self._busy_at = math.inf
            self._say_busy()
        if not self._told_time and "seconds_per_step" in figures:
            self._told_time = True
            seconds = figures["seconds_per_step"]
            hours = (self._plan.steps - step) * seconds / 3600
            logger.info("time        about %.2f hours more, at %.0f texts/s", hours, self._batch / seconds)
        if "loss" not in figures or (self._shown is not None and step <= self._shown):
            return
        fields = {"epoch": f"{figures['epoch']:.1f}", "loss": f"{figures['loss']:.3f}"}
        if self._metric in figures:
            fields[f"held-out {self._metric}"] = f"{figures[self._metric]:.1f}"
        self._progress.add((step - (self._shown or 0)) * self._batch, **fields)
        self._shown = step

    def _say_busy(self) -> None:
        """Ray Train waits for room, and says nothing."""
        there, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]  # Ray's
        kinds = ["CPU", "GPU"] if self._plan.recipe.cluster.gpu else ["CPU"]
        said = " and ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}" for kind in kinds)
        logger.warning(
            "no worker has begun after %.0f s; the cluster has %s free now: they are still starting, or wait for room",
            BUSY_S,
            said,
        )
