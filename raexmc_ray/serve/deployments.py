"""The deployments: a text encoder that batches, a memory shard, and the HTTP ingress that fans out."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from raexmc_ray.answer import make_answers
from raexmc_ray.embed import use_hardware
from raexmc_ray.files import Folder
from raexmc_ray.local import override
from raexmc_ray.memory.hits import Hits, SnapshotMismatchError, merge_hits
from raexmc_ray.memory.index import Lists, use_threads
from raexmc_ray.memory.shard import Shard, join_keys
from raexmc_ray.memory.snapshot import LABELS, open_snapshot
from raexmc_ray.predict import aggregate, vote_evidence
from raexmc_ray.recipe import Neighbours
from raexmc_ray.serve.schema import MemoryReply, PredictReply, PredictRequest, Problem, TextAnswer

PROBLEM_TYPE = "application/problem+json"
BATCH_WAIT_S = 0.005


@serve.deployment(max_ongoing_requests=256)
class Encoder:
    """Texts to embeddings; the texts of requests that arrive together are encoded together."""

    def __init__(self, memory: Folder, snapshot: str, threads: int) -> None:
        self._encoder = use_hardware(open_snapshot(memory, snapshot).encoder(), threads)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=BATCH_WAIT_S)
    async def encode(self, requests: list[list[str]]) -> list[np.ndarray]:
        """For each request's texts their embeddings: float32 [texts, d]."""
        texts = [text for request in requests for text in request]
        embeddings = await asyncio.to_thread(self._encoder.encode, texts)
        return np.split(embeddings, np.cumsum([len(request) for request in requests])[:-1])


@serve.deployment(max_ongoing_requests=64)
class MemoryShard:
    """One shard of the memory."""

    def __init__(self, memory: Folder, snapshot: str, shard: int) -> None:
        use_threads(1)
        self._shard = Shard(open_snapshot(memory, snapshot), shard)

    async def search(self, queries_BD: np.ndarray, neighbours: Neighbours, lists: Lists | None) -> Hits:
        return await asyncio.to_thread(self._shard.search, queries_BD, neighbours, lists)

    def keys(self, key_ids: np.ndarray) -> pa.Table:
        return self._shard.keys(key_ids)


api = FastAPI(
    title="raexmc_ray",
    description="Which of these labels fit this text? Answers come with the evidence for each label.",
    version="1",
)
ERRORS: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "The request is not valid"},
    503: {"model": Problem, "description": "A shard did not answer: there is no partial answer"},
}


# Serve takes a copy of the app where it decorates the ingress: what is registered later is lost.
def _problem(status: int, title: str, detail: str) -> JSONResponse:
    problem = Problem(title=title, status=status, detail=detail)
    return JSONResponse(problem.model_dump(), status, media_type=PROBLEM_TYPE)


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    lines = [f"{'.'.join(str(part) for part in p['loc'][1:])}: {p['msg']}" for p in error.errors()]
    return _problem(422, "The request is not valid", "; ".join(lines))


@api.exception_handler(TimeoutError)
async def _late(request: Request, error: TimeoutError) -> JSONResponse:
    return _problem(503, "Too late", "The encoder or a shard did not answer in time; try again")


@api.exception_handler(Exception)
async def _failed(request: Request, error: Exception) -> JSONResponse:
    # No trace and no path leave the house; Serve's log has them under the request's id.
    return _problem(503, "Not available", f"A part of the memory did not answer ({type(error).__name__}); try again")


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(api)
class Ingress:
    """The HTTP API under /v1."""

    def __init__(
        self,
        memory: Folder,
        snapshot: str,
        timeout_s: float,
        encoder: DeploymentHandle[Any],
        *shards: DeploymentHandle[Any],
    ) -> None:
        opened = open_snapshot(memory, snapshot)
        self._manifest = opened.manifest
        self._labels = pq.read_table(opened.file(LABELS))
        self._quantizer = opened.quantizer()
        self._encoder, self._shards, self._timeout_s = encoder, shards, timeout_s

    @api.post("/v1/predict", responses=ERRORS)
    async def predict(self, request: PredictRequest) -> PredictReply:
        """The best labels of each text, with scores and, if asked for, the evidence for each."""
        started = time.perf_counter()
        async with asyncio.timeout(self._timeout_s):
            settings = override(
                self._manifest.defaults, request.k, request.lambda_, request.temperature, request.neighbours
            )
            queries_BD = await self._encoder.encode.remote(request.texts)
            encoded = time.perf_counter()
            lists = self._quantizer.assign(queries_BD) if self._quantizer else None
            parts = await asyncio.gather(
                *(shard.search.remote(queries_BD, settings.neighbours, lists) for shard in self._shards)
            )
            searched = time.perf_counter()
            hits = merge_hits(parts, settings.neighbours)
            if hits.snapshot != self._manifest.id:
                raise SnapshotMismatchError(f"shards are at {hits.snapshot}, the ingress at {self._manifest.id}")
            lambda_, temperature = settings.lambda_, settings.temperature
            predictions = aggregate(hits, lambda_=lambda_, temperature=temperature, k=settings.k)
            if request.evidence:
                votes = vote_evidence(
                    hits, predictions, lambda_=lambda_, temperature=temperature, keys=request.evidence
                )
                tables = await asyncio.gather(*(shard.keys.remote(votes.key_ids) for shard in self._shards))
                answers = make_answers(predictions, self._labels, votes, join_keys(tables))
            else:
                answers = make_answers(predictions, self._labels)
        ended = time.perf_counter()
        spans = {
            "encode": encoded - started,
            "search": searched - encoded,
            "aggregate": ended - searched,
            "total": ended - started,
        }
        return PredictReply(
            snapshot=hits.snapshot,
            answers=[TextAnswer(labels=labels) for labels in answers],
            milliseconds={stage: round(1000 * seconds, 3) for stage, seconds in spans.items()},
        )

    @api.get("/v1/memory")
    def memory(self) -> MemoryReply:
        """The snapshot in use and its sizes."""
        manifest = self._manifest
        sizes = manifest.model_dump(
            include={"created", "instances", "labels", "shards", "dimension", "encoder_fingerprint"}
        )
        defaults = manifest.defaults.model_dump(mode="json", by_alias=True)
        return MemoryReply(snapshot=manifest.id, index=manifest.index.kind, defaults=defaults, **sizes)

    @api.get("/v1/health")
    def health(self) -> dict[str, str]:
        """The ingress is up."""
        return {"status": "ok"}

    @api.get("/v1/ready", responses=ERRORS)
    async def ready(self) -> dict[str, str]:
        """The encoder and every shard answer."""
        await self.predict(PredictRequest(texts=["ready"], k=1))
        return {"status": "ready"}
