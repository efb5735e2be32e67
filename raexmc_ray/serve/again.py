"""A call of a replica that is made once more: where the replica is lost, and where it keeps one waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import ray.exceptions

R = TypeVar("R")


async def call_again(call: Callable[[], Awaitable[R]], after_s: float | None, again: Callable[[], None]) -> R:
    """What the call gives, which is made a second time at most: at once where it was lost with its replica, and after
    `after_s` seconds without an answer, if there is another replica to ask, while the first still waits. A replica that
    hangs, or whose node is lost, raises nothing; Serve gives the second call to the replica with less to do, which is
    another one. The first success counts, and ends the other call.

    again: told that the call is made again. Raises what the last of the calls raised.
    """
    calls = [_begin(call)]
    try:
        await asyncio.wait(calls, timeout=after_s)
        if calls[0].done() and not isinstance(calls[0].exception(), ray.exceptions.RayActorError):
            return calls[0].result()
        again()
        calls.append(_begin(call))
        waiting = {one for one in calls if not one.done()}
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answered = [one for one in done if not one.cancelled() and not one.exception()]
            if answered or not waiting:
                return (answered or list(done))[0].result()
    finally:
        for one in calls:
            one.cancel()


def _begin(call: Callable[[], Awaitable[R]]) -> asyncio.Task[R]:
    async def run() -> R:
        return await call()

    task = asyncio.create_task(run())
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # of the one that nobody asks for, too
    return task
