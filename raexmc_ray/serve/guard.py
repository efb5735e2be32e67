"""What stands before the API: tokens, and bounds on what comes in."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raexmc_ray.serve.logs import write
from raexmc_ray.serve.schema import Limits, Problem, ServeSettings

PROBLEM_TYPE = b"application/problem+json"
TOKENS = "RAEXMC_TOKENS"
LEAST_TOKEN = 16
REREAD_S = 1.0
CLIENT_GONE = 499
"""What nginx writes for a caller that left before the answer."""
OPEN_PATHS = frozenset({"/", "/openapi.json", "/v1/health", "/v1/ready"})
"""What needs no token: the page and the API's description have no data in them, and a load balancer has none."""
PROBES = frozenset({"/v1/health", "/v1/ready"})
"""What a load balancer asks: cheap, and not refused for what others ask."""
access_log = logging.getLogger("ray.serve.access")
Answered = Callable[[str, int, float], None]
"""Told the path, the status and the seconds of each answer."""
Refusal = tuple[int, str, str, dict[str, str]]
"""Status, title, detail and headers of the answer to what does not come in."""


class Tokens:
    """The bearer tokens that are valid now: those in the environment, and those in a file, which may change."""

    def __init__(self, file: str | None) -> None:
        """Raises ValueError for a token that is too short or not printable, FileNotFoundError."""
        self._file = Path(file) if file else None
        self._fixed = _parse(os.environ.get(TOKENS, "").replace(",", "\n"), TOKENS)
        self._read: list[bytes] = []
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        if self._file:
            self._refresh()

    def __bool__(self) -> bool:
        return bool(self._file or self._fixed)

    def find(self, authorization: bytes) -> str | None:
        """A name for the valid token in this header's value, or None. Every token is compared, in constant time."""
        if self._file and time.monotonic() - self._looked > REREAD_S:
            try:
                self._refresh()
            except (OSError, ValueError) as error:
                access_log.error("%s; the tokens read before stay valid", error)
        scheme, _, given = authorization.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), token) for token in (*self._fixed, *self._read)]
        return f"token-{matches.index(True)}" if scheme.lower() == b"bearer" and any(matches) else None

    def _refresh(self) -> None:
        assert self._file
        self._looked = time.monotonic()
        info = self._file.stat()
        if self._stamp != (info.st_mtime_ns, info.st_size):
            self._read = _parse(self._file.read_text("utf-8"), str(self._file))
            self._stamp = info.st_mtime_ns, info.st_size


def _parse(text: str, source: str) -> list[bytes]:
    tokens = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for number, token in enumerate(tokens, 1):
        if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"{source}: token {number} must have {LEAST_TOKEN} printable characters or more and no space: "
                "make one with `openssl rand -hex 32`"
            )
    return [token.encode() for token in tokens]


def is_loopback(host: str | None) -> bool:
    """Whether a server that listens on `host` is reached from its own machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "0.0.0.0").is_loopback
    except ValueError:
        return False


def refuse_open_door(settings: ServeSettings, tokens: Tokens, host: str | None) -> None:
    """Raise ValueError where anyone on the network could ask, and nobody said that they may."""
    if not tokens and not settings.anonymous_access and not is_loopback(host):
        raise ValueError(
            f"the application would listen on {host or 'all interfaces'} with no token to guard it: set tokens_file or "
            f"(where the cluster starts) the environment variable {TOKENS}, or listen on 127.0.0.1, or say "
            "`anonymous_access: true`"
        )


class Guard:
    """ASGI middleware: knows each request by its id, refuses what must not come in, and writes the access log.

    In this order: no valid token (401), too many a second (429), too large a body (413) or one that takes longer than
    `body_s` (408). That there are not too many at a time is seen to in Serve's proxy (`gate.py`), which can refuse
    before it hands anything over; a body that never ended would keep its place there.
    """

    def __init__(self, app: ASGIApp, limits: Limits, tokens: Tokens, answered: Answered, body_s: float) -> None:
        self._app, self._limits, self._tokens, self._answered, self._body_s = app, limits, tokens, answered, body_s
        self._rate = RateLimitItemPerSecond(limits.requests_per_second) if limits.requests_per_second else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers, path = dict(scope["headers"]), path_of(scope)
        # Serve's proxy gives each request an id, or keeps the caller's, and says it in the answer's headers.
        request_id = request_id_of(headers)
        state = scope.setdefault("state", {})
        state["request_id"], state["started"] = request_id, started
        entry: dict[str, Any] = {"request": request_id, "method": scope["method"], "path": scope["path"]}
        body = _Bounded(receive, self._limits.body_bytes, self._body_s)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
            await send(message)

        async def unless_refused(message: Message) -> None:
            if not body.refusal or "status" in entry:  # frameworks make answers of their own of our exception
                await answer(message)

        try:
            refusal = self._refuse(path, headers)
            if refusal:
                await send_problem(answer, *refusal, request_id)
            else:
                with suppress(_Refused):
                    await self._app(scope, body, unless_refused)
                if body.refusal and "status" not in entry:
                    await send_problem(answer, *body.refusal, request_id)
        except Exception:
            # Here, and not in a handler of the framework's, which would answer outside of this and past the log. No
            # trace and no path leave the house; the log has them under the request's id.
            access_log.exception("request %s", request_id)
            if "status" in entry:
                raise  # the answer has begun: all that is left is to break it off
            detail = "This is a mistake of ours; the log has it under the request's id"
            await send_problem(answer, 500, "Error", detail, {}, request_id)
        finally:
            seconds = time.perf_counter() - started
            entry["ms"] = round(1000 * seconds, 2)
            self._answered(path, entry.get("status", CLIENT_GONE), seconds)
            write(access_log, f"request {request_id}", {**entry, **state.get("log", {})})

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        limits = self._limits
        caller: str | None = "anyone"
        if self._tokens and path not in OPEN_PATHS:
            caller = self._tokens.find(headers.get(b"authorization", b""))
            if caller is None:
                detail = "a valid token is missing: send the header `Authorization: Bearer TOKEN`"
                return 401, "Not authorised", detail, {"WWW-Authenticate": "Bearer"}
        if self._rate and path not in PROBES and not self._limiter.hit(self._rate, caller or ""):
            detail = f"more than {limits.requests_per_second} requests a second; come again"
            return 429, "Too many requests", detail, {"Retry-After": "1"}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.body_bytes:
            return _too_large(limits.body_bytes)
        return None


def path_of(scope: Scope) -> str:
    """The path within the application, whose `route_prefix` may be another than "/"."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The id that a request has by its headers, or a new one."""
    return headers.get(b"x-request-id", b"").decode("latin-1")[:128] or uuid.uuid4().hex


def _too_large(limit: int) -> Refusal:
    detail = f"the body has more than {limit:,} bytes: send fewer texts at a time"
    return 413, "The body is too large", detail, {"Connection": "close"}


def _too_slow(seconds: float) -> Refusal:
    detail = f"the body was not there after {seconds:g} seconds: send it faster, or fewer texts at a time"
    return 408, "The body is too slow", detail, {"Connection": "close"}


class _Refused(Exception):
    """The body is none that may come in."""


class _Bounded:
    """Receives a body of at most so many bytes within so many seconds from now, whatever its headers say."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._ends, self._bytes, self._whole = asyncio.get_running_loop().time() + seconds, 0, False
        self.refusal: Refusal | None = None

    async def __call__(self) -> Message:
        if self._whole:  # what is waited for now is that the caller leaves
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends):
                message = await self._receive()
        except TimeoutError:
            self.refusal = _too_slow(self._seconds)
            raise _Refused from None
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._limit:
            self.refusal = _too_large(self._limit)
            raise _Refused
        return message


async def send_problem(
    send: Any, status: int, title: str, detail: str, headers: dict[str, str], request_id: str
) -> None:
    """Answer with RFC 9457 problem details."""
    problem = Problem(title=title, status=status, detail=detail, request_id=request_id)
    body = problem.model_dump_json(exclude_none=True).encode()
    fields = [(b"content-type", PROBLEM_TYPE), (b"content-length", str(len(body)).encode())]
    fields += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
