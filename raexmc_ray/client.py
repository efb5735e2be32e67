"""A typed client of the HTTP API, blocking and asyncio.

>>> from raexmc_ray.client import Client
>>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
...     reply = client.predict(["vim: Vi IMproved"], k=5, evidence=3)
...     print(reply.answers[0].labels[0].text)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from raexmc_ray.recipe import Neighbours
from raexmc_ray.serve.schema import (
    LabelReply,
    LabelsReply,
    MemoryReply,
    PredictReply,
    PredictRequest,
    Problem,
    say_errors,
)

Reply = TypeVar("Reply", bound=BaseModel)
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0


class ApiError(RuntimeError):
    """The application answered with an error. `problem` is what it said, `retry_after_s` when to come again."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem, self.retry_after_s = problem, retry_after_s


class UnreachableError(ConnectionError):
    """Nothing answers at the URL, or it went away before the answer was complete."""


class Client:
    """Blocking client; keeps its connections, so use one for many calls. A context manager that closes them."""

    def __init__(self, url: str = DEFAULT_URL, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """token: bearer token, where the application wants one. Raises ValueError for what is no URL; every method
        raises ApiError, UnreachableError."""
        self._http = httpx.Client(**_settings(url, token, timeout_s))

    def predict(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        lambda_: float | None = None,
        temperature: float | None = None,
        neighbours: Neighbours | int | None = None,
        evidence: int = 0,
        labels_allowed: Sequence[str] | None = None,
        labels_blocked: Sequence[str] | None = None,
        allow_partial: bool = False,
    ) -> PredictReply:
        """The best k labels of each text; what is left out is as the snapshot's defaults have it.

        Arguments as `PredictRequest` has them; an integer for `neighbours` is the joint number. Raises ValueError
        for what can be seen to be wrong before it is sent.
        """
        body = _body(
            texts, k, lambda_, temperature, neighbours, evidence, labels_allowed, labels_blocked, allow_partial
        )
        return self._call("POST", "/v1/predict", PredictReply, content=body, headers=JSON)

    def labels(self, prefix: str, limit: int = 10) -> LabelsReply:
        """Labels whose text (in any case) or uid begins with `prefix`."""
        return self._call("GET", "/v1/labels", LabelsReply, params={"prefix": prefix, "limit": limit})

    def label(self, uid: str) -> LabelReply:
        """The label with this uid; ApiError 404 where there is none."""
        return self._call("GET", _path_of(uid), LabelReply)

    def memory(self) -> MemoryReply:
        """The snapshot in use and its sizes."""
        return self._call("GET", "/v1/memory", MemoryReply)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, reply: type[Reply], **request: Any) -> Reply:
        try:
            return _parse(self._http.request(method, path, **request), reply)
        except httpx.RequestError as error:
            raise _unreachable(self._http, error) from error


class AsyncClient:
    """As `Client`, for asyncio."""

    def __init__(self, url: str = DEFAULT_URL, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """As `Client`."""
        self._http = httpx.AsyncClient(**_settings(url, token, timeout_s))

    async def predict(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        lambda_: float | None = None,
        temperature: float | None = None,
        neighbours: Neighbours | int | None = None,
        evidence: int = 0,
        labels_allowed: Sequence[str] | None = None,
        labels_blocked: Sequence[str] | None = None,
        allow_partial: bool = False,
    ) -> PredictReply:
        """As `Client.predict`."""
        body = _body(
            texts, k, lambda_, temperature, neighbours, evidence, labels_allowed, labels_blocked, allow_partial
        )
        return await self._call("POST", "/v1/predict", PredictReply, content=body, headers=JSON)

    async def labels(self, prefix: str, limit: int = 10) -> LabelsReply:
        """Labels whose text (in any case) or uid begins with `prefix`."""
        return await self._call("GET", "/v1/labels", LabelsReply, params={"prefix": prefix, "limit": limit})

    async def label(self, uid: str) -> LabelReply:
        """The label with this uid; ApiError 404 where there is none."""
        return await self._call("GET", _path_of(uid), LabelReply)

    async def memory(self) -> MemoryReply:
        """The snapshot in use and its sizes."""
        return await self._call("GET", "/v1/memory", MemoryReply)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: str, path: str, reply: type[Reply], **request: Any) -> Reply:
        try:
            return _parse(await self._http.request(method, path, **request), reply)
        except httpx.RequestError as error:
            raise _unreachable(self._http, error) from error


JSON = {"content-type": "application/json"}


def _settings(url: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    token = token and token.strip()  # as a file has it
    if token and not re.fullmatch("[!-~]+", token):
        raise ValueError("token: a bearer token has printable ASCII characters only, and no blanks")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    # Callers bound their own concurrency; httpx's default of 100 connections would queue behind their backs.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        base_url = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise ValueError(f"{url} is no URL such as {DEFAULT_URL}: {error}") from None
    return {"base_url": base_url, "headers": headers, "timeout": timeout_s, "limits": limits}


def _body(
    texts: Sequence[str],
    k: int | None,
    lambda_: float | None,
    temperature: float | None,
    neighbours: Neighbours | int | None,
    evidence: int,
    labels_allowed: Sequence[str] | None,
    labels_blocked: Sequence[str] | None,
    allow_partial: bool,
) -> bytes:
    """The request as JSON, seen to be valid. Raises ValueError, which names the field."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts: write predict([text])")
    if isinstance(labels_allowed, str) or isinstance(labels_blocked, str):
        raise TypeError("labels_allowed and labels_blocked must be lists of uids: write [uid]")
    keys = Neighbours(joint=neighbours) if isinstance(neighbours, int) else neighbours
    content = {
        "texts": list(texts),
        "k": k,
        "lambda": lambda_,
        "temperature": temperature,
        "neighbours": keys.model_dump(exclude_none=True) if keys else None,
        "evidence": evidence,
        "labels_allowed": None if labels_allowed is None else list(labels_allowed),
        "labels_blocked": None if labels_blocked is None else list(labels_blocked),
        "allow_partial": allow_partial,
    }
    try:
        request = PredictRequest.model_validate(content)
    except ValidationError as error:
        raise ValueError(say_errors(error.errors())) from None
    return request.model_dump_json(by_alias=True, exclude_none=True).encode()


def _path_of(uid: str) -> str:
    # A uid of dots alone would be a way up in the path, if it were not for the slashes' own code.
    return f"/v1/labels/{quote(uid, safe='')}".replace("/.", "/%2E")


def _parse(response: httpx.Response, reply: type[Reply]) -> Reply:
    try:
        if response.status_code == 200:
            return reply.model_validate_json(response.content)
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # not from the application: a proxy's, or another server's
        problem = Problem(title=response.reason_phrase, status=response.status_code, detail=response.text[:500])
    after = response.headers.get("retry-after", "")
    raise ApiError(problem, float(after) if after.isdigit() else None)


def _unreachable(http: httpx.Client | httpx.AsyncClient, error: httpx.RequestError) -> UnreachableError:
    return UnreachableError(f"{http.base_url}: {str(error) or type(error).__name__}")
