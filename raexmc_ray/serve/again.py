"""A call of a replica that is made once more, on another one: where the replica is lost, and where it keeps one
waiting."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray.exceptions
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

R = TypeVar("R")


class Call:
    """Goes with a call, as the argument `call`, each time that it is made, and knows whom it was made of. A replica
    gets one that knows nothing."""

    def __init__(self) -> None:
        self.asked: set[ReplicaID] = set()

    def __reduce__(self) -> tuple[type[Call], tuple[()]]:
        return Call, ()


class AnotherReplicaRouter(FIFOMixin, RequestRouter):
    """Serve's own choice, of two replicas the one with less to do, but none is chosen for a call that is made again
    that was asked already, while there is another one. (By what they have to do alone it may be: one that hangs has one
    call in hand, and the one that does everybody's work meanwhile has as many.)

    FIFOMixin hands a chosen replica to the call that waits longest, so that where choosing takes time, and other calls
    come meanwhile, it may still be the same one. Without it Serve finds the waiting call by the id of the request that
    it is a part of: two calls with one id would wait for each other.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        others = candidate_replicas
        if pending_request:
            pending_request.routing_context.should_backoff = True  # where none of them can be had
            call = pending_request.kwargs.get("call") or Call()
            others = [replica for replica in others if replica.replica_id not in call.asked] or others
            pending_request.future.add_done_callback(lambda chosen: _note(call, chosen))
        return [random.sample(others, min(2, len(others)))]


def _note(call: Call, chosen: asyncio.Future[Any]) -> None:
    if not chosen.cancelled() and not chosen.exception():
        call.asked.add(chosen.result().replica_id)


async def answer_of(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> Any:
    """What it gives; whoever is cancelled meanwhile ends the call for its replica, too. (Serve does that only for calls
    that no replica has accepted yet: a search that nobody waits for would be done before those of others.)"""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()  # type: ignore[no-untyped-call]  # Ray's
        raise


async def call_again(make: Callable[[Call], Awaitable[R]], after_s: float | None, again: Callable[[], None]) -> R:
    """What the call gives, which is made a second time at most: at once where it was lost with its replica, and after
    `after_s` seconds without an answer, on another replica if there is one, while the first still waits. (A replica
    that hangs, or whose node is lost, raises nothing.) The first success counts, and ends the other call.

    make: makes the call, and passes on what it is given, by which AnotherReplicaRouter knows it again.
    again: told that the call is made again. Raises what the last of the calls raised.
    """
    call = Call()
    calls = [_begin(make, call)]
    try:
        await asyncio.wait(calls, timeout=after_s)
        if calls[0].done() and not isinstance(calls[0].exception(), ray.exceptions.RayActorError):
            return calls[0].result()
        again()
        calls.append(_begin(make, call))
        waiting = {one for one in calls if not one.done()}
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answered = [one for one in done if not one.cancelled() and not one.exception()]
            if answered or not waiting:
                return (answered or list(done))[0].result()
    finally:
        for one in calls:
            one.cancel()


def _begin(make: Callable[[Call], Awaitable[R]], call: Call) -> asyncio.Task[R]:
    async def run() -> R:
        return await make(call)

    task = asyncio.create_task(run())
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # of the one that nobody asks for, too
    return task
