"""Callers that ask an application again and again, in a thread of their own, and keep what they were told; and the
processes that answer them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.state import get_actor

from raexmc_ray.answer import ScoredLabel
from raexmc_ray.client import ApiError, AsyncClient, UnreachableError
from raexmc_ray.serve.rest import APPLICATION

Answers = Mapping[str, Sequence[Sequence[ScoredLabel]]]
"""{snapshot: for each text its labels}."""


class Load:
    """Context manager: `callers` callers ask for one text at a time until it ends.

    right: answers that were those of the snapshot that they named. wrong: answers that were not, described.
    errors: problems that the application named. broken: what was neither an answer nor a problem.
    """

    def __init__(self, url: str, texts: Sequence[str], expected: Answers, callers: int = 8) -> None:
        self._url, self._texts, self._expected, self._callers = url, texts, expected, callers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.right = 0
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self.broken: list[str] = []
        self.snapshots: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a caller hangs"

    def wait_for(self, more: int, seconds: float = 60.0) -> None:
        """Until so many more answers have come that were right."""
        wanted, ends = self.right + more, time.monotonic() + seconds
        while self.right < wanted:
            assert time.monotonic() < ends, f"{more} answers did not come: {self.errors[-3:]} {self.broken[-3:]}"
            time.sleep(0.02)

    async def _run(self) -> None:
        async with AsyncClient(self._url, timeout_s=30) as client:
            await asyncio.gather(*(self._call(client, first) for first in range(self._callers)))

    async def _call(self, client: AsyncClient, first: int) -> None:
        for number in itertools.count(first):
            if self._ended.is_set():
                return
            place = number % len(self._texts)
            try:
                reply = await client.predict([self._texts[place]], evidence=1)
            except ApiError as error:
                (self.errors if error.problem.status in (429, 503) else self.broken).append(str(error))
                await asyncio.sleep(0.05)
                continue
            except UnreachableError as error:
                self.broken.append(str(error))
                await asyncio.sleep(0.05)
                continue
            self._check(reply.snapshot, place, reply.answers[0].labels)

    def _check(self, snapshot: str, place: int, labels: Sequence[ScoredLabel]) -> None:
        self.snapshots.add(snapshot)
        wanted = self._expected[snapshot][place]
        same = [label.uid for label in labels] == [label.uid for label in wanted] and all(
            abs(got.score - label.score) < 1e-5 and [v.key_id for v in got.evidence or []] == [label.evidence[0].key_id]
            for got, label in zip(labels, wanted, strict=True)
            if label.evidence
        )
        if same:
            self.right += 1
        else:
            self.wrong.append(f"{snapshot}, text {place}: {[label.uid for label in labels]}")


def processes(deployment: str) -> list[int]:
    """Of the replicas that run, or of the controller."""
    dashboard = f"http://{ray.init(ignore_reinit_error=True).dashboard_url}"
    found: dict[str, Any] = ServeSubmissionClient(dashboard).get_serve_details()
    if deployment == "controller":
        actor = get_actor(found["controller_info"]["actor_id"], address=dashboard)
        return [actor.pid] if actor and actor.state == "ALIVE" else []
    replicas = found["applications"][APPLICATION]["deployments"][deployment]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]
