"""What stands in Serve's HTTP proxy: beyond so many requests at a time, the next one is refused before it costs much.

A proxy would otherwise hand over or queue whatever comes; refusing behind it costs as much as half an answer, and its
own queue is in no order. Serve takes middleware from a function that an environment variable of the cluster names
(environment.py); RAEXMC_REQUESTS_AT_A_TIME says how many, 128 where it is not set. Without the gate, Serve's own limits
hold (`build_app`). What is refused is in the proxy's log, and in `ray_raexmc_requests_total`, there with no
application's name.

A proxy has the requests of all of a cluster's applications. The gate knows ours by its paths, as they are where its
`route_prefix` is "/", and lets others through as if it were not there; with another prefix there is no gate.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raexmc_ray.serve.guard import PROBES, access_log, request_id_of, send_problem
from raexmc_ray.serve.logs import write
from raexmc_ray.serve.metrics import request_counter
from raexmc_ray.serve.schema import Limits

REQUESTS = "RAEXMC_REQUESTS_AT_A_TIME"
SPARE = 16
"""Places of an ingress beyond those that it is given: for probes, which a flood must not keep out, or a load balancer
takes a busy application for a dead one; and so that Serve's router, whose count lags behind, never waits."""
GATHER_S = 0.1
"""How long refusals are gathered before they are logged, on one line, and counted: for each by itself that was half of
what a refusal takes, and a flood's refusals take it from those who are answered."""
LOST = "Not available", "A part of the application did not answer; try again"
"""Title and detail of the answer where Serve has none."""
PAGES, API = frozenset({"/", "/openapi.json"}), "/v1/"
"""Paths of the application, and how the others begin."""


class Gate:
    """ASGI middleware: answers 503 with Retry-After while too many requests are on their way, and in the place of Serve
    where that has only its own words: of an ingress that was lost with its requests, say."""

    def __init__(self, app: ASGIApp, limit: int, count: Callable[[int], None]) -> None:
        """count: told how many requests were refused since it was told last."""
        self._app, self._limit, self._count, self._running = app, limit, count, 0
        self._refused: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (scope["path"] in PAGES or scope["path"].startswith(API)):
            await self._app(scope, receive, send)
            return
        if self._running >= self._limit + (SPARE if scope["path"] in PROBES else 0):
            await self._refuse(scope, send, "Busy", f"{self._limit} requests are being answered; come again")
            return
        begun = refused = gone = False

        async def heard() -> Message:
            nonlocal gone
            message = await receive()
            gone |= message["type"] == "http.disconnect"
            return message

        async def as_a_problem(message: Message) -> None:
            nonlocal begun, refused
            if message["type"] == "http.response.start":
                kind = Headers(raw=message.get("headers", [])).get("content-type", "")
                failed = message["status"] >= 500 or message["status"] == 408
                begun, refused = True, failed and kind.startswith("text/plain")  # as all of Serve's own are
                if refused:
                    await self._refuse(scope, send, *LOST)
            if not refused:
                await send(message)

        self._running += 1
        try:
            await self._app(scope, heard, as_a_problem)
        finally:
            self._running -= 1
        if not begun and not gone:  # of a replica that was lost before its answer began Serve says nothing at all
            await self._refuse(scope, send, *LOST)

    async def _refuse(self, scope: Scope, send: Send, title: str, detail: str) -> None:
        started, path = time.perf_counter(), scope["path"]
        request_id = request_id_of(dict(scope["headers"]))  # what gives requests their ids is behind this
        try:
            await send_problem(send, 503, title, detail, {"Retry-After": "1", "X-Request-ID": request_id}, request_id)
        finally:
            if not self._refused:
                asyncio.get_running_loop().call_later(GATHER_S, self._tell)
            ms = round(1000 * (time.perf_counter() - started), 2)
            self._refused.append({"request": request_id, "method": scope["method"], "path": path, "ms": ms})

    def _tell(self) -> None:
        refused, self._refused = self._refused, []
        self._count(len(refused))
        write(access_log, f"{len(refused)} requests refused", {"status": 503, "refused": refused})


def middlewares() -> list[Middleware]:
    """For Serve."""
    requests = request_counter()

    def count(refused: int) -> None:
        requests.inc(refused, tags={"status": "503"})

    return [Middleware(Gate, limit=int(os.environ.get(REQUESTS, Limits().concurrent_requests)), count=count)]
