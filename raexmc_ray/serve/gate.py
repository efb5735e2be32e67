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

import os
import time

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raexmc_ray.serve.guard import PROBES, Answered, access_log, request_id_of, send_problem
from raexmc_ray.serve.logs import write
from raexmc_ray.serve.metrics import request_counter
from raexmc_ray.serve.schema import Limits

REQUESTS = "RAEXMC_REQUESTS_AT_A_TIME"
SPARE = 16
"""Places of an ingress beyond those that it is given: for probes, which a flood must not keep out, or a load balancer
takes a busy application for a dead one; and so that Serve's router, whose count lags behind, never waits."""
LOST = "Not available", "A part of the application did not answer; try again"
"""Title and detail of the answer where Serve has none."""
PAGES, API = frozenset({"/", "/openapi.json"}), "/v1/"
"""Paths of the application, and how the others begin."""


class Gate:
    """ASGI middleware: answers 503 with Retry-After while too many requests are on their way, and in the place of Serve
    where that has only its own words: of an ingress that was lost with its requests, say."""

    def __init__(self, app: ASGIApp, limit: int, answered: Answered) -> None:
        self._app, self._limit, self._answered, self._running = app, limit, answered, 0

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
            seconds = time.perf_counter() - started
            self._answered(path, 503, seconds)
            entry = {"request": request_id, "method": scope["method"], "path": path, "status": 503}
            write(access_log, f"request {request_id}", {**entry, "ms": round(1000 * seconds, 2)})


def middlewares() -> list[Middleware]:
    """For Serve."""
    requests = request_counter()

    def answered(path: str, status: int, seconds: float) -> None:
        requests.inc(tags={"status": str(status)})

    return [Middleware(Gate, limit=int(os.environ.get(REQUESTS, Limits().concurrent_requests)), answered=answered)]
