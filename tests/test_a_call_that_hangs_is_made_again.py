"""A call of a replica that is lost or hangs is made once more; the first success counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from ray.exceptions import ActorUnavailableError

from raexmc_ray.serve.again import call_again

PATIENCE_S = 0.1


class Replica:
    """Calls that take so long and then raise or give something; `ended` says how each of them did."""

    def __init__(self, *calls: tuple[float, object]) -> None:
        self._calls, self.begun, self.ended, self.again = calls, 0, list[str](), 0

    async def __call__(self) -> object:
        seconds, result = self._calls[self.begun]
        self.begun += 1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append(str(result))
        if isinstance(result, Exception):
            raise result
        return result

    def count(self) -> None:
        self.again += 1


LOST = ActorUnavailableError("lost", None)


def ask(replica: Replica, after_s: float | None = PATIENCE_S, within_s: float = 5.0) -> object:
    async def run() -> object:
        try:
            async with asyncio.timeout(within_s):
                return await call_again(replica, after_s, replica.count)
        finally:
            await asyncio.sleep(0)  # whatever was cancelled has its turn
            assert len(asyncio.all_tasks()) == 1, "nothing is left behind"

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("calls", "answer", "ended"),
    [
        ([(0.0, "first")], "first", ["first"]),
        ([(9.0, "first"), (0.0, "second")], "second", ["second", "cancelled"]),
        ([(0.2, "first"), (9.0, "second")], "first", ["first", "cancelled"]),
        ([(0.0, LOST), (0.0, "second")], "second", ["lost", "second"]),
        ([(0.15, LOST), (0.15, "second")], "second", ["lost", "second"]),
        ([(0.2, "first"), (0.0, LOST)], "first", ["lost", "first"]),
        ([(0.0, LOST), (0.2, "second")], "second", ["lost", "second"]),
    ],
)
def test_the_first_success_counts(calls: list[tuple[float, object]], answer: str, ended: list[str]) -> None:
    replica = Replica(*calls)
    assert ask(replica) == answer
    assert [said.replace(str(LOST), "lost") for said in replica.ended] == ended
    assert replica.again == len(calls) - 1


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([(0.0, KeyError("ours"))], KeyError),  # is no reason to ask again
        ([(0.0, LOST), (0.0, LOST)], ActorUnavailableError),
        ([(0.15, LOST), (0.1, KeyError("ours"))], KeyError),
        ([(9.0, "first"), (9.0, "second")], TimeoutError),
    ],
)
def test_where_none_answers_the_last_error_is_raised(calls: list, error: type[Exception]) -> None:
    replica = Replica(*calls)
    with pytest.raises(error):
        ask(replica, within_s=0.5)
    assert replica.begun == len(replica.ended) == len(calls)


def test_where_there_is_no_other_replica_nobody_is_asked_twice() -> None:
    replica = Replica((9.0, "first"))
    with pytest.raises(TimeoutError):
        ask(replica, None, 0.3)
    assert replica.ended == ["cancelled"]
    lost = Replica((0.0, LOST), (0.0, "second"))  # which Serve starts again
    assert ask(lost, None) == "second"


def test_it_costs_a_call_little() -> None:
    async def at_once() -> int:
        return 1

    async def seconds(call: Callable) -> float:
        started = time.perf_counter()
        for _ in range(1000):
            await call()
        return time.perf_counter() - started

    async def run() -> float:
        return await seconds(lambda: call_again(at_once, PATIENCE_S, lambda: None)) - await seconds(at_once)

    assert asyncio.run(run()) < 0.5, "half a millisecond each would be seen in the answers"
