"""A call of a replica that is lost or hangs is made once more; the first success counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from ray import serve
from ray.exceptions import ActorUnavailableError

from raexmc_ray.serve.again import Call, answer_of, call_again
from raexmc_ray.serve.deployments import ROUTER

PATIENCE_S = 0.1


class Replica:
    """Calls that take so long and then raise or give something; `ended` says how each of them did."""

    def __init__(self, *calls: tuple[float, object]) -> None:
        self._calls, self.begun, self.ended, self.again = calls, 0, list[str](), 0

    async def __call__(self, call: Call) -> object:
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
    async def at_once(call: Call) -> int:
        return 1

    async def seconds(call: Callable) -> float:
        started = time.perf_counter()
        for _ in range(1000):
            await call(Call())
        return time.perf_counter() - started

    async def run() -> float:
        return await seconds(lambda _: call_again(at_once, PATIENCE_S, lambda: None)) - await seconds(at_once)

    assert asyncio.run(run()) < 0.5, "half a millisecond each would be seen in the answers"


@serve.deployment(
    num_replicas=2, max_ongoing_requests=5, ray_actor_options={"num_cpus": 0.1}, request_router_config=ROUTER
)
class Sleeper:
    async def sleep(self, seconds: float, *, call: Call) -> str:
        """The replica that slept."""
        await asyncio.sleep(seconds)
        return serve.get_replica_context().replica_id.unique_id


@pytest.mark.ray
def test_it_is_made_of_another_replica_even_where_that_has_as_much_to_do(ray_cluster: str) -> None:
    """By what they have to do alone every second one would go to the replica that hangs. None of the calls that hang
    keeps its replica busy afterwards: it takes five at a time."""
    serve.start(proxy_location="Disabled")
    sleep = serve.run(Sleeper.bind(), name="sleeper", route_prefix=None).sleep

    async def hang_then_ask() -> bool:
        durations = iter([60.0, 0.0])
        asked = asyncio.create_task(
            call_again(lambda call: answer_of(sleep.remote(next(durations), call=call)), PATIENCE_S, lambda: None)
        )
        await asyncio.sleep(PATIENCE_S / 2)  # one replica hangs: the other one gets the next call
        busy = await sleep.remote(2 * PATIENCE_S, call=Call())
        return await asked == busy

    async def run() -> list[bool]:
        return [await hang_then_ask() for _ in range(20)]

    try:
        assert all(asyncio.run(run()))
    finally:
        serve.shutdown()
