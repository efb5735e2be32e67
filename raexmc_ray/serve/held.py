"""What replicas have open. Every call names its snapshot, so a roll-out never mixes two in one answer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
KEPT = 2
"""The snapshot in use, and the one before it (to go back to) or after it (to move to)."""


class Held(Generic[T]):
    """Opens what belongs to a snapshot when it is first asked for, in a thread, and keeps the last two."""

    def __init__(self, open_: Callable[[str], T]) -> None:
        self._open = open_
        self._opened: OrderedDict[str, asyncio.Future[T]] = OrderedDict()

    async def get(self, snapshot: str) -> T:
        """What belongs to the snapshot. Raises what opening it raises; the next call then tries again."""
        if snapshot not in self._opened:
            opening = asyncio.ensure_future(asyncio.to_thread(self._open, snapshot))
            opening.add_done_callback(lambda done: self._forget_failed(snapshot, done))
            self._opened[snapshot] = opening
            while len(self._opened) > KEPT:
                self._opened.popitem(last=False)
        self._opened.move_to_end(snapshot)
        return await asyncio.shield(self._opened[snapshot])  # whoever gives up waiting does not stop it for the others

    def _forget_failed(self, snapshot: str, opening: asyncio.Future[T]) -> None:
        """Also where nobody waits for it any more."""
        failed = opening.cancelled() or opening.exception()
        if failed and self._opened.get(snapshot) is opening:
            del self._opened[snapshot]
