"""Batches that form by themselves: what waits while others are worked on goes together next.

Serve's own `@serve.batch` forms a batch by the clock, and its batches then queue; here a lone caller never waits, and
under load a batch is as large as the work before it took long.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Gathers items of concurrent callers into batches."""

    def __init__(
        self,
        work: Callable[[Sequence[T], Callable[[int, R | Exception], None]], Awaitable[None]],
        *,
        size: Callable[[T], int],
        max_size: int,
        concurrency: int = 1,
    ) -> None:
        """work: given a batch and `answer`, it calls `answer(place, result)` for each item, by its place in the batch,
        with what the item's caller gets or has raised; the caller has it at once. size: of an item; a batch has
        `max_size` together at most, or one item. concurrency: batches worked on at a time."""
        self._work, self._size, self._max_size, self._free = work, size, max_size, concurrency
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, item: T) -> R:
        """What `work` makes of the item, in whatever batch. A caller that is cancelled while it waits costs nothing."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._start()
        return await future

    def _start(self) -> None:
        while self._free and (batch := self._next()):
            self._free -= 1
            # In the context of no caller: Serve would log the batch's calls under the id of the one that happened to
            # start it, and stop them for all when that one leaves.
            task = asyncio.create_task(self._run(batch), context=contextvars.Context())
            self._running.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._running.discard)

    def _next(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        total = 0
        while self._waiting:
            item, future = self._waiting[0]
            total += self._size(item)
            if batch and total > self._max_size:
                break
            self._waiting.popleft()
            if future.done():  # its caller has gone
                total -= self._size(item)
            else:
                batch.append((item, future))
        return batch

    async def _run(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        def answer(place: int, result: R | Exception) -> None:
            future = batch[place][1]
            if future.done():  # its caller has gone, or has its answer
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        try:
            await self._work([item for item, _ in batch], answer)
        except Exception as error:
            for place in range(len(batch)):
                answer(place, error)
        finally:
            for _, future in batch:
                future.cancel()  # nobody waits for what a cancelled batch has not answered
            self._free += 1
            self._start()
