"""Shards that did not answer in time: nobody but one call waits for them in full, until they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ABSENT_S = 0.2
"""How long a call waits for a shard that is absent. It may be back, and answers in less."""


class Absent:
    """A circuit breaker for each shard, after Nygard's Release It!: closed until a call had no answer in time. While it
    is open one call at a time waits in full, to find out whether the shard is back; others must not hold their batches,
    with what other shards found for them, for a shard that nobody expects to answer. The first answer closes it."""

    def __init__(self) -> None:
        self._shards, self._awaited = set[int](), set[int]()

    @contextmanager
    def asking(self, shard: int, fair: bool = True) -> Iterator[float | None]:
        """Around a call of the shard: gives the seconds that it may take at most, or None, where it may wait in full.
        The call raises TimeoutError where there is no answer in time; fair: which is then the shard's fault."""
        absent = shard in self._shards
        finds_out = absent and shard not in self._awaited
        if finds_out:
            self._awaited.add(shard)
        try:
            yield ABSENT_S if absent and not finds_out else None
        except TimeoutError:
            if fair:
                self._shards.add(shard)
            raise
        else:
            self._shards.discard(shard)
        finally:
            if finds_out:
                self._awaited.discard(shard)
