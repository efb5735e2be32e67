"""From requests to answers: gather them into a batch, encode it, ask every shard, aggregate, part it again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.exceptions
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from raexmc_ray.answer import ScoredLabel, make_answers
from raexmc_ray.files import Folder
from raexmc_ray.label_lookup import LabelLookup
from raexmc_ray.local import override
from raexmc_ray.memory.hits import Hits, SnapshotMismatchError, asked_of_a_shard, merge_hits, unsettled
from raexmc_ray.memory.index import CoarseQuantizer, Lists
from raexmc_ray.memory.shard import join_keys
from raexmc_ray.memory.snapshot import LABELS, Manifest, open_snapshot
from raexmc_ray.predict import Predictions, aggregate, vote_evidence
from raexmc_ray.recipe import Neighbours, PredictionSection
from raexmc_ray.serve.api import make_api
from raexmc_ray.serve.batching import Batcher
from raexmc_ray.serve.errors import MissingShardsError, RequestError, UnknownLabelError
from raexmc_ray.serve.guard import Tokens, refuse_open_door
from raexmc_ray.serve.metrics import IngressMetrics
from raexmc_ray.serve.schema import Joint, PredictReply, PredictRequest, ServeSettings, TextAnswer

BATCHES = 2
"""Batches on their way at a time: one is searched and aggregated while the next is encoded."""
log = logging.getLogger("ray.serve.batches")


@dataclass(frozen=True)
class View:
    """What the ingress itself needs of a snapshot."""

    manifest: Manifest
    labels: LabelLookup
    quantizer: CoarseQuantizer | None

    @classmethod
    def open(cls, memory: Folder, snapshot: str) -> View:
        opened = open_snapshot(memory, snapshot)
        return cls(opened.manifest, LabelLookup(pq.read_table(opened.file(LABELS))), opened.quantizer())

    def indices(self, uids: list[str]) -> np.ndarray:
        """int64: the labels with these uids. Raises UnknownLabelError."""
        found = [self.labels.find(uid) for uid in uids]
        if None in found:
            raise UnknownLabelError(uids[found.index(None)])
        return np.array(found, np.int64)


@dataclass(frozen=True, eq=False)
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


Answers = dict[Query, PredictReply | Exception]


@dataclass
class Clock:
    """Seconds spent in each stage of a batch."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def lap(self, stage: str) -> None:
        """What was not spent in a stage before was spent in this one."""
        spent = time.perf_counter() - self.started - sum(self.seconds.values())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP API under /v1, and the page."""

    def __init__(
        self, settings: ServeSettings, memory: Folder, encoder: DeploymentHandle[Any], *shards: DeploymentHandle[Any]
    ) -> None:
        self._settings, self._memory, self._encoder, self._shards = settings, memory, encoder, shards
        self._tokens = Tokens(settings.tokens_file)
        refuse_open_door(settings, self._tokens, _http_host())
        self._metrics = IngressMetrics()
        self._view: View | None = None
        self._batcher: Batcher[Query, PredictReply] = Batcher(
            self._answer_all,
            size=lambda query: len(query.texts),
            max_size=settings.batch_texts,
            concurrency=BATCHES,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._settings, self._tokens)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Move to a snapshot. Requests that are on their way are answered from the one that they came in under."""
        self._view = await asyncio.to_thread(View.open, self._memory, config["snapshot"])

    def check_health(self) -> None:
        """Serve asks every few seconds."""
        self._metrics.snapshot(self.view.manifest.id)

    @property
    def view(self) -> View:
        """The snapshot in use."""
        assert self._view, "Serve calls `reconfigure` before it sends requests"
        return self._view

    def answered(self, path: str, status: int, seconds: float) -> None:
        """An HTTP request was answered with this status after so long."""
        self._metrics.request(path.split("/labels/")[0], status, seconds)

    async def predict(self, request: PredictRequest, request_id: str, started: float) -> PredictReply:
        """Answer a request that came at `started` (of `time.perf_counter`).

        Raises RequestError, UnknownLabelError, TimeoutError, MissingShardsError.
        """
        view, deadline = self.view, started + self._settings.timeout_s
        # In a thread, where there are any: thousands of look-ups would hold up every other request.
        allowed, blocked = [
            None if uids is None else await asyncio.to_thread(view.indices, uids)
            for uids in (request.labels_allowed, request.labels_blocked)
        ]
        query = Query(
            view,
            request.texts,
            self._effective(request, view.manifest.defaults),
            request.evidence,
            allowed,
            blocked,
            request.allow_partial,
            request_id,
            started,
            deadline,
        )
        async with _until(deadline):
            return await self._batcher.submit(query)

    def _effective(self, request: PredictRequest, defaults: PredictionSection) -> PredictionSection:
        """The snapshot's defaults with the request's settings, within the limits. Raises RequestError."""
        limits, given = self._settings.limits, request.neighbours
        keys = given.joint if isinstance(given, Joint) else max(given.instances, given.labels) if given else 0
        for what, asked, limit in (
            ("texts: texts", len(request.texts), limits.texts),
            ("texts: characters in a text", max(map(len, request.texts)), limits.characters),
            ("k: labels", request.k or 0, limits.k),
            ("neighbours: keys", keys, limits.neighbours),
        ):
            if asked > limit:
                raise RequestError(f"{what}: {asked:,} are more than the {limit:,} that this application allows")
        neighbours = Neighbours(**given.model_dump()) if given else None
        return override(defaults, request.k, request.lambda_, request.temperature, neighbours)

    async def _answer_all(self, queries: Sequence[Query]) -> Sequence[PredictReply | Exception]:
        """The replies of a batch, each query's or its error."""
        answers: Answers = {}
        clock = Clock()
        self._metrics.batch(sum(len(query.texts) for query in queries))
        for query in queries:
            self._metrics.stages({"queue": clock.started - query.arrived})
        ordered = sorted(queries, key=lambda query: (query.retrieval, query.aggregation))
        for snapshot, same in itertools.groupby(ordered, key=lambda query: query.view.manifest.id):
            group = list(same)
            texts = [text for query in group for text in query.texts]
            deadline = max(query.deadline for query in group)
            try:
                queries_BD = await self._call("encoder", deadline, self._encoder.encode.remote, snapshot, texts)
            except Exception as error:
                answers |= dict.fromkeys(group, error)
                continue
            clock.lap("encode")
            start = 0
            for _, alike in itertools.groupby(group, key=lambda query: query.retrieval):
                some = list(alike)
                stop = start + sum(len(query.texts) for query in some)
                try:
                    answers |= await self._retrieve(some, queries_BD[start:stop], deadline, clock)
                except Exception as error:
                    answers |= dict.fromkeys(some, error)
                start = stop
        self._metrics.stages(clock.seconds)
        return [answers[query] for query in queries]

    async def _retrieve(self, queries: list[Query], queries_BD: np.ndarray, deadline: float, clock: Clock) -> Answers:
        """Search once for queries that differ in nothing that a search depends on, then answer each."""
        view, neighbours = queries[0].view, queries[0].settings.neighbours
        lists = await asyncio.to_thread(view.quantizer.assign, queries_BD) if view.quantizer else None
        shards = range(len(self._shards))
        asked = asked_of_a_shard(neighbours, len(shards))
        parts = await self._search(shards, queries, queries_BD, lists, asked, deadline)
        clock.lap("search")
        if not parts:
            return dict.fromkeys(queries, MissingShardsError(shards))
        hits = await asyncio.to_thread(merge_hits, list(parts.values()), neighbours)
        rows = unsettled(list(parts.values()), hits, asked) if asked != neighbours else ()
        clock.lap("merge")
        if len(rows):  # as in `search_all`
            some_lists = lists and lists.of(rows)
            parts = await self._search(parts, queries, queries_BD[rows], some_lists, neighbours, deadline)
            clock.lap("search")
            if not parts:
                return dict.fromkeys(queries, MissingShardsError(shards))
            hits = hits.with_rows(np.asarray(rows), merge_hits(list(parts.values()), neighbours))
        if hits.snapshot != view.manifest.id:
            raise SnapshotMismatchError(f"shards answered from {hits.snapshot}, asked for {view.manifest.id}")
        missing = [shard for shard in shards if shard not in parts]
        answers: Answers = {
            query: MissingShardsError(missing) for query in queries if missing and not query.allow_partial
        }
        stops = np.cumsum([len(query.texts) for query in queries]).tolist()
        starts = dict(zip(queries, [0, *stops], strict=False))
        for _, same in itertools.groupby(queries, key=lambda query: query.aggregation):
            some = list(same)
            if some[0] in answers:  # whether a query takes a partial answer is part of what it is grouped by
                continue
            mine = hits.rows(starts[some[0]], starts[some[-1]] + len(some[-1].texts))
            labels = await self._aggregate(mine, some[0], deadline)
            clock.lap("aggregate")
            for query in some:
                start = starts[query] - starts[some[0]]
                answers[query] = _reply(query, labels[start : start + len(query.texts)], missing, clock)
        return answers

    async def _aggregate(self, hits: Hits, query: Query, deadline: float) -> list[list[ScoredLabel]]:
        """The answers for the texts of `query`, and of those that ask for the same."""
        settings, table = query.settings, query.view.labels.table
        weights: dict[str, Any] = {"lambda_": settings.lambda_, "temperature": settings.temperature}

        def predict() -> Predictions:
            return aggregate(hits, **weights, k=settings.k, allowed=query.allowed, blocked=query.blocked)

        if not query.evidence:
            return await asyncio.to_thread(lambda: make_answers(predict(), table))
        predictions = await asyncio.to_thread(predict)
        evidence = await asyncio.to_thread(vote_evidence, hits, predictions, **weights, keys=query.evidence)
        keys = await self._keys(query.view.manifest.id, evidence.key_ids, deadline)
        return await asyncio.to_thread(make_answers, predictions, table, evidence, keys)

    async def _keys(self, snapshot: str, key_ids: np.ndarray, deadline: float) -> dict[int, dict[str, str]]:
        """{key id: {"kind", "uid", "text"}}, asked of the shards that have them."""
        owners = key_ids % len(self._shards)
        calls = [
            self._call(f"shard {shard}", deadline, self._shards[shard].keys.remote, snapshot, key_ids[owners == shard])
            for shard in np.unique(owners).tolist()
        ]
        return join_keys(await asyncio.gather(*calls)) if calls else {}

    async def _search(
        self,
        shards: Iterable[int],
        queries: list[Query],
        queries_BD: np.ndarray,
        lists: Lists | None,
        asked: Neighbours,
        deadline: float,
    ) -> dict[int, Hits]:
        """What each of these shards found; without those that did not answer in time."""
        snapshot, neighbours = queries[0].view.manifest.id, queries[0].settings.neighbours
        until = min(deadline, time.perf_counter() + self._settings.shard_timeout_s)

        async def one(shard: int) -> tuple[int, Hits | None]:
            started, search = time.perf_counter(), self._shards[shard].search.remote
            try:
                hits = await self._call(f"shard {shard}", until, search, snapshot, queries_BD, neighbours, lists, asked)
            except Exception as error:
                self._metrics.missing(shard)
                requests = [query.request_id for query in queries]
                log.warning(
                    "shard %d did not answer (%s: %s), requests %s", shard, type(error).__name__, error, requests
                )
                return shard, None
            self._metrics.shard(shard, time.perf_counter() - started)
            return shard, hits

        found = await asyncio.gather(*map(one, shards))
        return {shard: hits for shard, hits in found if hits is not None}

    async def _call(self, of: str, deadline: float, remote: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """The call's result; made once more, on another replica, where it was lost with its replica."""
        async with _until(deadline):
            try:
                return await remote(*arguments)
            except ray.exceptions.RayActorError:
                self._metrics.retry(of)
                return await remote(*arguments)


def _reply(query: Query, rows: list[list[ScoredLabel]], missing: list[int], clock: Clock) -> PredictReply:
    total = time.perf_counter() - query.arrived
    stages = {"queue": clock.started - query.arrived, **clock.seconds, "total": total}
    return PredictReply(
        snapshot=query.view.manifest.id,
        answers=[TextAnswer(labels=labels) for labels in rows],
        missing_shards=missing,
        milliseconds={stage: round(1000 * seconds, 3) for stage, seconds in stages.items()},
    )


def _until(deadline: float) -> asyncio.Timeout:
    """Raises TimeoutError in the block at `deadline` (of `time.perf_counter`)."""
    return asyncio.timeout(max(0.0, deadline - time.perf_counter()))


def _http_host() -> str | None:
    """Where this cluster's Serve listens. Serve tells nobody else than its own client."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client, "only called in a replica"
    host: str | None = client.http_config.host
    return host
