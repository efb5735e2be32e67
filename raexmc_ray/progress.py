"""One line of progress: done of total, rate, time left. Redrawn on a terminal; elsewhere a line every ten
seconds, so that logs stay readable."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_EVERY_S = 10.0
SAY_S = 3.0
"""Whoever waits for longer is told for what."""
logger = logging.getLogger("raexmc_ray")


class Progress:
    """Counts `total` units of work under a name; shown while in use as a context manager."""

    quiet = False
    """Show nothing, anywhere in this process (`raexmc --quiet`)."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0, *, if_long: bool = False) -> None:
        """if_long: show nothing of what is done within LOG_EVERY_S."""
        self._terminal = sys.stderr.isatty()
        self._if_long = if_long
        self._bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            unit=f" {unit}",
            disable=self.quiet,
            delay=LOG_EVERY_S if if_long else 0,
            file=sys.stderr if self._terminal else _Nowhere(),
            bar_format="{desc}: {n:,} of {total:,}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}",
        )
        self._logged = time.monotonic()
        self._said: float = -1  # the units that were logged last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        untold = self._if_long and self._said < 0
        if kind is None and self._said != self._bar.n and not untold:
            self._log()
        self._bar.close()

    def add(self, units: int, **fields: str) -> None:
        """So many more units are done; `fields` stand at the end of the line."""
        if fields:
            self._bar.set_postfix(fields, refresh=False)
        self._bar.update(units)
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self._log()

    def begin_at(self, units: int) -> None:
        """So many units were done before, by another process: they count as done, and not in the rate."""
        self._bar.reset()
        self._bar.n = self._bar.initial = self._bar.last_print_n = units

    def _log(self) -> None:
        self._logged, self._said = time.monotonic(), self._bar.n
        if not self._terminal and not self.quiet:
            logger.info("%s", self._bar)


@contextmanager
def said_if_long(what: str) -> Iterator[None]:
    """Say what is being done, if it takes longer than SAY_S: for work that cannot be counted."""

    def say() -> None:
        if not Progress.quiet:
            logger.info("%s", what)

    timer = threading.Timer(SAY_S, say)
    timer.daemon = True  # a command that is broken off does not wait for it
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Nowhere:
    """Where tqdm draws when there is no terminal."""

    def write(self, text: str) -> None:
        del text

    def flush(self) -> None:
        pass
