"""From requests to answers: gather them into a batch, encode it, ask every shard, aggregate, part it again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from raexmc_ray.answer import ScoredLabel, make_answers
from raexmc_ray.files import Folder
from raexmc_ray.local import override
from raexmc_ray.memory.hits import Hits, SnapshotMismatchError, asked_of_a_shard, merge_hits, unsettled
from raexmc_ray.memory.index import Lists
from raexmc_ray.memory.shard import join_keys
from raexmc_ray.predict import Evidence, Predictions, aggregate, vote_evidence
from raexmc_ray.recipe import Neighbours, PredictionSection
from raexmc_ray.serve.absent import Absent
from raexmc_ray.serve.again import Call, answer_of, call_again
from raexmc_ray.serve.api import make_api
from raexmc_ray.serve.batching import Batcher
from raexmc_ray.serve.errors import MissingShardsError, RequestError
from raexmc_ray.serve.guard import Tokens, refuse_open_door
from raexmc_ray.serve.held import Held
from raexmc_ray.serve.logs import write
from raexmc_ray.serve.metrics import IngressMetrics
from raexmc_ray.serve.query import Answer, Batch, Clock, Query, View, apart, reply_to, rows_of, span
from raexmc_ray.serve.schema import Joint, PredictReply, PredictRequest, ServeSettings

BATCHES = 2
"""Batches on their way at a time for each encoder: one is searched and aggregated while the next is encoded."""
INLINE_CELLS = 1_000
"""Cells of an array that are worked through in the time that it takes to hand them to a thread: about a text's."""
READY_S = 1.0
"""How long what was found out about being ready counts."""
log = logging.getLogger("ray.serve.batches")
R = TypeVar("R")


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP API under /v1, and the page."""

    def __init__(
        self, settings: ServeSettings, memory: Folder, encoder: DeploymentHandle[Any], *shards: DeploymentHandle[Any]
    ) -> None:
        self._settings = settings
        # Once: each attribute of a handle is a new handle.
        self._encode = encoder.encode
        self._searches, self._look_ups = [shard.search for shard in shards], [shard.keys for shard in shards]
        # How long a call has no answer before another replica is asked, too; None where there is no other.
        self._encoder_patience_s = settings.shard_timeout_s if most_encoders(settings) > 1 else None
        self._shard_patience_s = settings.shard_timeout_s / 3 if settings.shard_replicas > 1 else None
        self._tokens = Tokens(settings.tokens_file)
        refuse_open_door(settings, self._tokens, _http_host())
        self._metrics, self._absent = IngressMetrics(), Absent()
        self._views = Held(lambda snapshot: View.open(memory, snapshot, settings.limits))
        self._view: View | None = None
        self._probe: asyncio.Task[PredictReply] | None = None
        self._probed = 0.0
        self._batcher: Batcher[Query, PredictReply] = Batcher(
            self._answer_all,
            size=lambda query: len(query.texts),
            max_size=settings.batch_texts,
            concurrency=batches_at_a_time(settings),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._settings, self._tokens)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Move to a snapshot. Requests that are on their way are answered from the one that they came in under."""
        self._view = await self._views.get(config["snapshot"])

    async def hold(self, snapshot: str) -> None:
        """Have what the ingress needs of this snapshot open."""
        await self._views.get(snapshot)

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
        resource, of_a_label, _ = path.partition("/labels/")
        self._metrics.request(f"{resource}/labels/{{uid}}" if of_a_label else path, status, seconds)

    async def predict(
        self, request: PredictRequest, request_id: str, started: float, entry: dict[str, Any]
    ) -> PredictReply:
        """Answer a request that came at `started` (of `time.perf_counter`). entry: what the access log is told of it.

        Raises RequestError, UnknownLabelError, TimeoutError, MissingShardsError.
        """
        view, deadline = self.view, started + self._settings.timeout_s
        settings = self._effective(request, view.defaults)
        # In a thread, where there are any: thousands of look-ups would hold up every other request.
        allowed, blocked = [
            None if uids is None else await asyncio.to_thread(view.indices, uids)
            for uids in (request.labels_allowed, request.labels_blocked)
        ]
        query = Query(
            view,
            request.texts,
            settings,
            request.evidence,
            allowed,
            blocked,
            request.allow_partial,
            request_id,
            started,
            deadline,
            entry,
        )
        async with _until(deadline):
            return await self._batcher.submit(query)

    async def ready(self) -> None:
        """Ask the encoder and every shard, once in READY_S whoever wants to know. Raises as `predict` does."""
        now = time.perf_counter()
        if not self._probe or (self._probe.done() and now > self._probed + READY_S):
            question = PredictRequest(texts=["?"], k=1)  # within any limits
            self._probe, self._probed = asyncio.create_task(self.predict(question, "ready", now, {})), now
        await asyncio.shield(self._probe)  # others may wait for it, too

    def _effective(self, request: PredictRequest, defaults: PredictionSection) -> PredictionSection:
        """The defaults, with the request's settings in their place. Raises RequestError beyond the limits."""
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
        settings = override(defaults, request.k, request.lambda_, request.temperature, neighbours)
        entries = len(request.texts) * settings.k * (1 + request.evidence)
        if entries > limits.entries:
            raise RequestError(
                f"texts × k × (1 + evidence) is {entries:,}, more than the {limits.entries:,} that a reply may have "
                "here: ask for fewer at a time"
            )
        return settings

    async def _answer_all(
        self, queries: Sequence[Query], answer_at: Callable[[int, PredictReply | Exception], None]
    ) -> None:
        """Answer each query of a batch, by its place in it, as soon as there is its reply, or its error."""
        began = time.perf_counter()
        batch = Batch(queries, began)
        self._metrics.batch(batch.texts)
        for query in queries:
            self._metrics.stages({"queue": began - query.arrived})
        places = {query: place for place, query in enumerate(queries)}

        def answer(query: Query, reply: PredictReply | Exception) -> None:
            answer_at(places[query], reply)

        async def of_a_snapshot(group: list[Query]) -> None:
            snapshot, texts = group[0].view.manifest.id, [text for query in group for text in query.texts]
            deadline, clock = max(query.deadline for query in group), Clock(began)

            async def encode(call: Call) -> np.ndarray:
                return await answer_of(self._encode.remote(snapshot, texts, call=call))

            queries_BD = await self._call(batch, "encoder", deadline, self._encoder_patience_s, encode)
            clock.lap("encode")
            self._spent(batch, clock.seconds)
            rows = rows_of(group)

            async def alike(some: list[Query]) -> None:
                await self._retrieve(some, queries_BD[span(some, rows)], deadline, clock.split(), answer)

            await apart(group, lambda query: query.retrieval, alike, answer)

        ordered = sorted(queries, key=lambda query: (query.retrieval, query.aggregation))
        await apart(ordered, lambda query: query.view.manifest.id, of_a_snapshot, answer)
        write(log, f"batch {batch.id}", batch.entry())

    async def _retrieve(
        self, queries: list[Query], queries_BD: np.ndarray, deadline: float, clock: Clock, answer: Answer
    ) -> None:
        """Search once for queries that differ in nothing that a search depends on, then answer each.

        Raises MissingShardsError where no shard answered.
        """
        view, neighbours = queries[0].view, queries[0].settings.neighbours
        lists = await asyncio.to_thread(view.quantizer.assign, queries_BD) if view.quantizer else None
        shards = range(len(self._searches))
        asked = asked_of_a_shard(neighbours, len(shards))
        parts = await self._search(shards, queries, queries_BD, lists, asked, deadline)
        clock.lap("search")
        found = list(parts.values())
        hits = await _aside(sum(part.key_ids_Bb.size for part in found), merge_hits, found, neighbours)
        rows = unsettled(found, hits, asked) if asked != neighbours else ()
        clock.lap("merge")
        if len(rows):  # as in `search_all`
            some_lists = lists and lists.of(rows)
            parts = await self._search(parts, queries, queries_BD[rows], some_lists, neighbours, deadline)
            clock.lap("search")
            hits = hits.with_rows(np.asarray(rows), merge_hits(list(parts.values()), neighbours))
        if hits.snapshot != view.manifest.id:
            raise SnapshotMismatchError(f"shards answered from {hits.snapshot}, asked for {view.manifest.id}")
        self._spent(queries[0].batch, {stage: clock.seconds[stage] for stage in ("search", "merge")})
        missing = [shard for shard in shards if shard not in parts]
        places = rows_of(queries)

        async def alike(some: list[Query]) -> None:
            if missing and not some[0].allow_partial:  # which is part of what they are grouped by
                raise MissingShardsError(missing)
            first, spent = span(some, places), clock.split()
            labels = await self._aggregate(hits.rows(first.start, first.stop), some, deadline)
            spent.lap("aggregate")
            self._spent(some[0].batch, {"aggregate": spent.seconds["aggregate"]})
            for query, mine in rows_of(some).items():
                answer(query, reply_to(query, labels[mine], missing, spent))

        await apart(queries, lambda query: query.aggregation, alike, answer)

    async def _aggregate(self, hits: Hits, queries: list[Query], deadline: float) -> list[list[ScoredLabel]]:
        """The answers for the texts of queries that ask for the same. Raises MissingShardsError."""
        query = queries[0]
        settings, table = query.settings, query.view.shown
        weights: dict[str, Any] = {"lambda_": settings.lambda_, "temperature": settings.temperature}
        cells = hits.key_ids_Bb.size + len(hits.key_ids_Bb) * settings.k * (1 + query.evidence)

        def predict() -> tuple[Predictions, Evidence | None]:
            best = aggregate(hits, **weights, k=settings.k, allowed=query.allowed, blocked=query.blocked)
            return best, vote_evidence(hits, best, **weights, keys=query.evidence) if query.evidence else None

        predictions, evidence = await _aside(cells, predict)
        keys = await self._keys(evidence.key_ids, queries, deadline) if evidence else None
        return await _aside(cells, make_answers, predictions, table, evidence, keys)

    async def _keys(self, key_ids: np.ndarray, queries: list[Query], deadline: float) -> dict[int, dict[str, str]]:
        """{key id: {"kind", "uid", "text"}}, asked of the shards that have them. Raises MissingShardsError."""
        snapshot, owners = queries[0].view.manifest.id, key_ids % len(self._look_ups)
        characters = self._settings.limits.reply_characters
        shards = np.unique(owners).tolist()

        async def look_up(shard: int, call: Call) -> pa.Table:
            wanted = key_ids[owners == shard]
            return await answer_of(self._look_ups[shard].remote(snapshot, wanted, characters, call=call))

        parts = await self._ask(shards, look_up, queries, deadline)
        if len(parts) < len(shards):
            raise MissingShardsError([shard for shard in shards if shard not in parts])
        return join_keys(list(parts.values())) if parts else {}

    async def _search(
        self,
        shards: Iterable[int],
        queries: list[Query],
        queries_BD: np.ndarray,
        lists: Lists | None,
        asked: Neighbours,
        deadline: float,
    ) -> dict[int, Hits]:
        """What each of these shards found; without those that did not answer in time. Raises MissingShardsError where
        none did."""
        snapshot, neighbours = queries[0].view.manifest.id, queries[0].settings.neighbours

        async def search(shard: int, call: Call) -> Hits:
            started = time.perf_counter()
            response = self._searches[shard].remote(snapshot, queries_BD, neighbours, lists, asked, call=call)
            hits: Hits = await answer_of(response)
            seconds = time.perf_counter() - started
            self._metrics.shard(shard, seconds)
            queries[0].batch.shard(shard, seconds)
            return hits

        parts = await self._ask(shards, search, queries, deadline)
        if not parts:
            raise MissingShardsError(range(len(self._searches)))
        return parts

    async def _ask(
        self, shards: Iterable[int], ask: Callable[[int, Call], Awaitable[R]], queries: list[Query], deadline: float
    ) -> dict[int, R]:
        """What a call of each of these shards gives; without those that did not answer in time, counted and logged:
        but not where hardly any time was left of the requests', which says nothing about a shard."""
        now, batch, settings = time.perf_counter(), queries[0].batch, self._settings
        until = min(deadline, now + settings.shard_timeout_s)
        fair = until - now >= min(settings.shard_timeout_s, settings.timeout_s) / 2

        async def one(shard: int) -> tuple[int, R | None]:
            try:
                with self._absent.asking(shard, fair) as at_most_s:
                    end = until if at_most_s is None else min(until, time.perf_counter() + at_most_s)
                    return shard, await self._call(
                        batch, f"shard {shard}", end, self._shard_patience_s, partial(ask, shard)
                    )
            except Exception as error:
                if fair or not isinstance(error, TimeoutError):
                    self._metrics.missing(shard)
                    batch.missing(shard)
                    said = type(error).__name__, error
                    log.warning("batch %s: shard %d did not answer (%s: %s)", batch.id, shard, *said)
                return shard, None

        answers = await asyncio.gather(*map(one, shards))
        return {shard: answer for shard, answer in answers if answer is not None}

    async def _call(
        self,
        batch: Batch,
        of: str,
        deadline: float,
        after_s: float | None,
        make: Callable[[Call], Awaitable[R]],
    ) -> R:
        """The call's result; made once more, on another replica, where it was lost with its replica, or had no answer
        after `after_s` seconds."""

        def again() -> None:
            self._metrics.retry(of)
            batch.again(of)

        async with _until(deadline):
            return await call_again(make, after_s, again)

    def _spent(self, batch: Batch, seconds: dict[str, float]) -> None:
        """So long was spent in each stage."""
        self._metrics.stages(seconds)
        batch.spent(seconds)


def batches_at_a_time(settings: ServeSettings) -> int:
    """Batches that an ingress has on their way: BATCHES for each encoder that there may be, its share of them where
    there are other ingresses. Were they fewer, Serve would never see encoders in demand, and add none."""
    return max(BATCHES, -(-BATCHES * most_encoders(settings) // settings.ingress_replicas))


def most_encoders(settings: ServeSettings) -> int:
    """Encoders that there may be."""
    return max(settings.encoder_replicas, settings.encoder_replicas_at_most or 0)


async def _aside(cells: int, work: Callable[..., R], *arguments: Any) -> R:
    """What this work on so many cells gives: done in a thread where it would hold up every other request."""
    return work(*arguments) if cells <= INLINE_CELLS else await asyncio.to_thread(work, *arguments)


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
