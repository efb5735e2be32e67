"""What stands in Serve's HTTP proxy: beyond so many requests at a time, the next one is refused before it costs much.

A proxy would otherwise hand over or queue whatever comes; refusing behind it costs as much as half an answer, and its
own queue is in no order. Serve takes middleware from a function that an environment variable of the cluster names:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=raexmc_ray.serve.gate:middlewares
    RAEXMC_REQUESTS_AT_A_TIME=128        # at each proxy

`raexmc serve` sets both. Where they are not set, Serve's own limits hold (`build_app`).
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from raexmc_ray.serve.guard import send_problem
from raexmc_ray.serve.schema import Limits

REQUESTS = "RAEXMC_REQUESTS_AT_A_TIME"
CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raexmc_ray.serve.gate:middlewares"}


class Gate:
    """ASGI middleware: answers 503 with Retry-After while too many requests are on their way."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit, self._running = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own: health and routes
            await self._app(scope, receive, send)
            return
        if self._running >= self._limit:
            detail = f"{self._limit} requests are being answered; come again"
            request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")[:128]
            await send_problem(send, 503, "Busy", detail, {"Retry-After": "1"}, request_id)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(Gate, limit=int(os.environ.get(REQUESTS, Limits().concurrent_requests)))]
