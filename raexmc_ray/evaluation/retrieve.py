"""One retrieval for everything that is measured: the best keys of each kind, of which all else are cuts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from raexmc_ray.corpus import Split
from raexmc_ray.local import Memory
from raexmc_ray.memory.hits import Hits
from raexmc_ray.predict import Predictions, aggregate
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import MOST_NEIGHBOURS, Neighbours, PredictionSection

BATCH = 256
"""Rows searched at once."""
ENCODED_AT_ONCE = 8192
"""Rows; the encoder sorts them by length, so that little is padded."""
CUTTING_KINDS = ("flat", "flat-fp16", "flat-sq8", "ivf-fp16")
"""Kinds of index in which the best keys are the first of a deeper search, and the best of all are among the best
instances and the best labels. In the others few candidates are rescored, or a graph is walked as far as is asked."""


class Stopwatch:
    """Adds up the seconds of each stage: {stage: seconds}."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside counts for this stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started


@dataclass(frozen=True)
class Retrieved:
    """What was found for a batch of rows.

    part: which rows of the queries. deepest: the best instances and the best labels apart. exclude: CSR [B, L], the
    rows' filter pairs. own_B: int64, the rows' own keys, where they are in the memory: they are masked.
    """

    part: slice
    deepest: Hits
    exclude: sp.csr_matrix
    own_B: np.ndarray | None
    memory: Memory
    queries_BD: np.ndarray

    def hits(self, neighbours: Neighbours) -> Hits:
        """The best `neighbours` keys: a cut of the deepest retrieval, or where the kind of index gives other keys for
        another number of them, what it is asked for here."""
        if self.memory.manifest.index.kind in CUTTING_KINDS:
            return self.deepest.cut(neighbours, self.own_B)
        if self.own_B is None:
            return self.memory.search(self.queries_BD, neighbours)
        return self.memory.search(self.queries_BD, one_more(neighbours)).cut(neighbours, self.own_B)

    def predict(self, settings: PredictionSection, k: int, hits: Hits | None = None) -> Predictions:
        """The best k labels at these settings, less the filter pairs. hits: from `hits`, if they are there already."""
        hits = hits or self.hits(settings.neighbours)
        return aggregate(hits, lambda_=settings.lambda_, temperature=settings.temperature, k=k, exclude=self.exclude)


def encode(memory: Memory, split: Split) -> np.ndarray:
    """Queries float32 [rows, d] of the split's texts, with a line of progress."""
    queries_BD = np.empty((len(split), memory.encoder.dimension), np.float32)
    with Progress("encode", len(split), "rows") as progress:
        for start in range(0, len(split), ENCODED_AT_ONCE):
            texts = split.texts["text"].slice(start, ENCODED_AT_ONCE).to_pylist()
            queries_BD[start : start + len(texts)] = memory.encoder.encode(texts)
            progress.add(len(texts))
    return queries_BD


def retrieve(
    memory: Memory,
    queries_BD: np.ndarray,
    depth: int,
    filtered: sp.csr_matrix,
    own_B: np.ndarray | None = None,
    stopwatch: Stopwatch | None = None,
) -> Iterator[Retrieved]:
    """The best `depth` instances and the best `depth` labels for each query, a batch at a time.

    queries_BD: float32, of unit length. filtered, own_B: of all queries, as in `Retrieved`.
    """
    stopwatch = stopwatch or Stopwatch()
    asked = Neighbours(instances=depth, labels=depth)
    for start in range(0, len(queries_BD), BATCH):
        part = slice(start, min(start + BATCH, len(queries_BD)))
        own = None if own_B is None else own_B[part]
        with stopwatch.stage("search"):
            hits = memory.search(queries_BD[part], asked if own is None else one_more(asked))
        yield Retrieved(part, hits, filtered[part], own, memory, queries_BD[part])


def width_of(neighbours: Neighbours) -> int:
    """b: how many keys `neighbours` retrieves."""
    return neighbours.joint or (neighbours.instances or 0) + (neighbours.labels or 0)


def deepest_of(neighbours: Neighbours) -> int:
    """How many instances and how many labels must be retrieved so that `neighbours` is a cut of them."""
    return neighbours.joint or max(neighbours.instances or 0, neighbours.labels or 0)


def one_more(neighbours: Neighbours) -> Neighbours:
    """One key more of each kind there is, in the place of one that is masked."""
    asked = {name: number and min(number + 1, MOST_NEIGHBOURS) for name, number in neighbours.model_dump().items()}
    return Neighbours(**asked)
