"""A request on its way through a batch, and the groups that it is in on the way."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raexmc_ray.answer import ScoredLabel
from raexmc_ray.files import Folder
from raexmc_ray.label_lookup import LabelLookup
from raexmc_ray.memory.index import CoarseQuantizer
from raexmc_ray.memory.shard import cut_texts
from raexmc_ray.memory.snapshot import LABELS, Manifest, open_snapshot
from raexmc_ray.recipe import Neighbours, PredictionSection
from raexmc_ray.serve.errors import UnknownLabelError
from raexmc_ray.serve.schema import Limits, PredictReply, TextAnswer


@dataclass(frozen=True)
class View:
    """What the ingress itself needs of a snapshot."""

    manifest: Manifest
    labels: LabelLookup
    quantizer: CoarseQuantizer | None
    defaults: PredictionSection
    """The snapshot's, as far as this application's limits allow them."""
    shown: pa.Table
    """The labels (index, uid, text) as replies have them: with texts that are cut."""

    @classmethod
    def open(cls, memory: Folder, snapshot: str, limits: Limits) -> View:
        opened = open_snapshot(memory, snapshot)
        labels = LabelLookup(pq.read_table(opened.file(LABELS)))
        shown, defaults = cut_texts(labels.table, limits.reply_characters), within(limits, opened.manifest.defaults)
        return cls(opened.manifest, labels, opened.quantizer(), defaults, shown)

    def indices(self, uids: list[str]) -> np.ndarray:
        """int64: the labels with these uids. Raises UnknownLabelError."""
        found = [self.labels.find(uid) for uid in uids]
        if None in found:
            raise UnknownLabelError(uids[found.index(None)])
        return np.array(found, np.int64)


def within(limits: Limits, settings: PredictionSection) -> PredictionSection:
    """The settings, where they are beyond the limits cut to these."""
    keys = {name: min(number, limits.neighbours) for name, number in settings.neighbours if number is not None}
    return settings.model_copy(update={"neighbours": Neighbours(**keys), "k": min(settings.k, limits.k)})


@dataclass(eq=False)
class Query:
    """A request on its way through a batch."""

    view: View
    texts: list[str]
    settings: PredictionSection
    evidence: int
    allowed: np.ndarray | None
    blocked: np.ndarray | None
    allow_partial: bool
    request_id: str
    arrived: float
    deadline: float
    entry: dict[str, Any]
    """What the access log is told of the request."""
    batch: Batch = field(init=False)
    """The one that it rides in."""

    @property
    def retrieval(self) -> tuple[str, str]:
        """Queries of which this is the same are searched together."""
        return self.view.manifest.id, repr(self.settings.neighbours)

    @property
    def aggregation(self) -> tuple[Any, ...]:
        """Queries of which this is the same, too, are aggregated together."""
        filtered = id(self) if self.allowed is not None or self.blocked is not None else 0
        settings = self.settings
        return settings.lambda_, settings.temperature, settings.k, self.evidence, self.allow_partial, filtered


Answer = Callable[[Query, PredictReply | Exception], None]
"""Gives a query's caller its reply, or what went wrong."""


class Batch:
    """What the log is told of requests that ride together: by its id, and by theirs, a slow or failed one is followed
    to the shard that it waited for."""

    def __init__(self, queries: Sequence[Query], began: float) -> None:
        """Has each of them say that it rides in this one."""
        self.id = uuid.uuid4().hex[:16]
        self.texts = sum(len(query.texts) for query in queries)
        # Not the queries themselves: they have this, and a circle of objects is freed late.
        self._requests = [query.request_id for query in queries]
        self._snapshots = sorted({query.view.manifest.id for query in queries})
        self._stages = {"queue": began - min(query.arrived for query in queries)}
        self._shards: dict[int, float] = {}
        self._again: list[str] = []
        self._missing: set[int] = set()
        for query in queries:
            query.batch, query.entry["batch"] = self, self.id

    def spent(self, seconds: dict[str, float]) -> None:
        """Some of the queries spent so long in each stage."""
        for stage, spent in seconds.items():
            self._stages[stage] = max(spent, self._stages.get(stage, 0.0))

    def shard(self, shard: int, seconds: float) -> None:
        """The shard answered after so long."""
        self._shards[shard] = max(seconds, self._shards.get(shard, 0.0))

    def again(self, of: str) -> None:
        """A call was made once more."""
        self._again.append(of)

    def missing(self, shard: int) -> None:
        """The shard did not answer."""
        self._missing.add(shard)

    def entry(self) -> dict[str, Any]:
        """Milliseconds are the slowest query's in each stage, and the slowest call's of each shard."""
        return {
            "batch": self.id,
            "requests": self._requests,
            "texts": self.texts,
            "snapshots": self._snapshots,
            "stages": {stage: round(1000 * seconds, 3) for stage, seconds in self._stages.items()},
            "shards": {shard: round(1000 * self._shards[shard], 3) for shard in sorted(self._shards)},
            "again": self._again,
            "missing_shards": sorted(self._missing),
        }


@dataclass
class Clock:
    """Seconds spent in each stage on the way of some queries."""

    started: float
    seconds: dict[str, float] = field(default_factory=dict)

    def lap(self, stage: str) -> None:
        """What was not spent in a stage before was spent in this one."""
        spent = time.perf_counter() - self.started - sum(self.seconds.values())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def split(self) -> Clock:
        """A clock for queries whose way parts from the others' here."""
        return Clock(self.started, dict(self.seconds))


async def apart(
    queries: Iterable[Query],
    key: Callable[[Query], Any],
    work: Callable[[list[Query]], Awaitable[None]],
    answer: Answer,
) -> None:
    """Work on all groups of neighbouring queries with the same key at a time. What one raises is the answer of its
    queries, and of no others."""

    async def one(group: list[Query]) -> None:
        try:
            await work(group)
        except Exception as error:
            for query in group:
                answer(query, error)

    await asyncio.gather(*(one(list(group)) for _, group in itertools.groupby(queries, key)))


def rows_of(queries: list[Query]) -> dict[Query, slice]:
    """Where the texts of each query are among the texts of all."""
    stops = np.cumsum([len(query.texts) for query in queries]).tolist()
    return {query: slice(stop - len(query.texts), stop) for query, stop in zip(queries, stops, strict=True)}


def span(queries: list[Query], rows: dict[Query, slice]) -> slice:
    """Where the texts of neighbouring queries are."""
    return slice(rows[queries[0]].start, rows[queries[-1]].stop)


def reply_to(query: Query, rows: list[list[ScoredLabel]], missing: list[int], clock: Clock) -> PredictReply:
    total = time.perf_counter() - query.arrived
    stages = {"queue": clock.started - query.arrived, **clock.seconds, "total": total}
    return PredictReply(
        snapshot=query.view.manifest.id,
        answers=[TextAnswer(labels=labels) for labels in rows],
        missing_shards=missing,
        milliseconds={stage: round(1000 * seconds, 3) for stage, seconds in stages.items()},
    )
