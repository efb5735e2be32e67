"""Where the time of training goes: the share of each part of a step, texts a second, padding."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "forward", "loss", "backward", "communication", "optimizer", "mining", "evaluation", "checkpoint")


class Meter:
    """Sums seconds by part of a step, and texts and tokens, since it was last read.

    On a GPU each part ends with a synchronisation: kernels run later than they are launched. That costs a step
    of large batches nothing that can be measured, and the loss is read at each step anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time spent inside counts as `part`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds[part] += time.perf_counter() - started

    def count(self, texts: int, tokens: int, cells: int) -> None:
        """One more step is done, with so many texts of so many tokens, `cells` with the padding."""
        self._texts += texts
        self._tokens += tokens
        self._cells += cells

    def read(self) -> dict[str, float]:
        """{"texts_per_s", "padding", "share_data", …} since the last reading: shares of the time from 0 to 1."""
        elapsed = time.perf_counter() - self._started
        shares = {f"share_{part}": self._seconds[part] / elapsed for part in PARTS}
        figures = {
            "texts_per_s": self._texts / elapsed,
            "padding": 1 - self._tokens / max(self._cells, 1),
            **shares,
        }
        self._reset()
        return figures

    def _reset(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._texts = self._tokens = self._cells = 0
        self._started = time.perf_counter()
