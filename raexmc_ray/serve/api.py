"""The HTTP API: routes, errors as problem details, and the page."""

from __future__ import annotations

import base64
import hashlib
import logging
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

import ray.exceptions
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from ray.serve.exceptions import RayServeException
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException as StarletteHTTPException

from raexmc_ray.label_lookup import label_rows
from raexmc_ray.serve.errors import MissingShardsError, RequestError, UnknownLabelError
from raexmc_ray.serve.guard import PROBLEM_TYPE, Guard, Tokens
from raexmc_ray.serve.schema import (
    LabelReply,
    LabelsReply,
    Limits,
    MemoryReply,
    PredictReply,
    PredictRequest,
    Problem,
    ServeSettings,
    Status,
    say_errors,
)

if TYPE_CHECKING:
    from raexmc_ray.serve.ingress import Ingress

logger = logging.getLogger("ray.serve.api")


EXAMPLES = {
    400: ("Error", "There was an error parsing the body"),
    401: ("Not authorised", "a valid token is missing: send the header `Authorization: Bearer TOKEN`"),
    404: ("There is no such label", "no label of this memory has the uid 'vmi'"),
    408: ("The body is too slow", "the body was not there after 15 seconds: send it faster, or fewer texts at a time"),
    413: ("The body is too large", "the body has more than 8,388,608 bytes: send fewer texts at a time"),
    422: ("The request is not valid", "k: Input should be less than or equal to 1000"),
    429: ("Too many requests", "more than 100 requests a second; come again"),
    503: ("A shard did not answer", str(MissingShardsError([2]))),
}
"""Of each status, a title and a detail."""


class _Whole(PathConvertor):
    """All that is left of a path. Starlette's own `path` ends at a line break, and finds another label than was asked
    for."""

    regex = "(?s:.*)"


register_url_convertor("whole", _Whole())


def _errors(**said: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's account of the errors of a route: {"e404": what it means}."""
    both = {
        **said,
        "e401": "No valid token",
        "e413": "The body is too large",
        "e429": "Too many requests a second: come again after `Retry-After` seconds",
        "e503": "Busy, late, or a shard did not answer: there is no partial answer unless `allow_partial` asks for it",
    }
    return {
        int(code[1:]): {"description": meaning, "content": _content(int(code[1:]))} for code, meaning in both.items()
    }


def _content(status: int) -> dict[str, Any]:
    """OpenAPI's account of a problem, with an example."""
    title, detail = EXAMPLES[status]
    example = Problem(title=title, status=status, detail=detail, request_id="6b1f8a4e").model_dump(exclude_none=True)
    return {PROBLEM_TYPE.decode(): {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}


def make_api(ingress: Ingress, settings: ServeSettings, tokens: Tokens) -> FastAPI:
    """The application that answers for `ingress`."""
    api = FastAPI(
        title="raexmc_ray",
        description="Which of these labels fit this text? Answers come with the evidence for each label.",
        version="1",
        docs_url=None,  # Swagger's and Redoc's pages load scripts from outside
        redoc_url=None,
        redirect_slashes=False,  # a path that there is not is that, and no way to one that there is
    )
    _add_errors(api)
    _add_routes(api, ingress, settings)
    api.add_middleware(
        Guard, limits=settings.limits, tokens=tokens, answered=ingress.answered, body_s=settings.timeout_s
    )
    described = api.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        _state_limits(document["components"]["schemas"], settings.limits)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        if tokens:
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                if path not in ("/v1/health", "/v1/ready"):
                    for operation in operations.values():
                        operation["security"] = [{"token": []}]
        return document

    api.openapi = openapi  # type: ignore[method-assign]
    return api


def _state_limits(schemas: dict[str, Any], limits: Limits) -> None:
    """Have the description say what this application allows, where that is less than what the API does."""
    schemas["Joint"]["properties"]["joint"]["maximum"] = limits.neighbours
    for kind in ("instances", "labels"):
        schemas["Apart"]["properties"][kind]["maximum"] = limits.neighbours
    request = schemas["PredictRequest"]["properties"]
    request["k"]["anyOf"][0]["maximum"] = limits.k
    request["texts"]["maxItems"] = limits.texts
    request["texts"]["items"]["maxLength"] = limits.characters


def _add_routes(api: FastAPI, ingress: Ingress, settings: ServeSettings) -> None:
    limits, page = settings.limits, resources.files("raexmc_ray.serve").joinpath("page.html").read_text("utf-8")
    security = _security(page)

    @api.post(
        "/v1/predict",
        response_model=PredictReply,
        responses=_errors(
            e400="The body is not text",
            e404="A filter names a label that there is not",
            e408="The body took longer than `timeout_s`",
            e422="The request is not valid",
        ),
    )
    async def predict(body: PredictRequest, request: Request) -> Response:
        """The best labels of each text, with scores and, if asked for, the evidence for each."""
        state = request.state
        # Before it is answered: what fails is looked for in the log, too.
        state.log = {"texts": len(body.texts), "snapshot": ingress.view.manifest.id}
        if settings.log_texts:
            state.log["said"] = body.texts
        reply = await ingress.predict(body, state.request_id, state.started, state.log)
        state.log["stages"] = reply.milliseconds
        # Written by pydantic itself: FastAPI would validate the reply once more, and walk through it in Python.
        return Response(reply.model_dump_json(), media_type="application/json")

    @api.get("/v1/labels", responses=_errors(e422="The request is not valid"))
    async def labels(
        prefix: Annotated[str, Query(min_length=1, max_length=200, description="How it begins.", examples=["vi"])],
        limit: Annotated[int, Query(ge=1, le=100, description="At most so many.", examples=[10])] = 10,
    ) -> LabelsReply:
        """Labels whose text (in any case) or uid begins with `prefix`."""
        view = ingress.view
        rows = label_rows(view.shown, view.labels.starting_with(prefix, limit))
        return LabelsReply(snapshot=view.manifest.id, labels=[LabelReply.model_validate(row) for row in rows])

    @api.get(
        "/v1/labels/{uid:whole}",
        responses=_errors(e404="There is no such label", e422="The request is not valid"),
    )
    async def label(
        uid: Annotated[str, Path(min_length=1, max_length=1000, description="Of a label.", examples=["vim"])],
    ) -> LabelReply:
        """The label with this uid, and its whole text."""
        found = ingress.view.labels
        index = found.find(uid)
        if index is None:
            raise UnknownLabelError(uid)
        return LabelReply.model_validate(label_rows(found.table, [index])[0])

    @api.get("/v1/memory", responses=_errors())
    async def memory() -> MemoryReply:
        """The snapshot in use and its sizes."""
        manifest, defaults = ingress.view.manifest, ingress.view.defaults
        sizes = manifest.model_dump(
            include={"created", "instances", "labels", "shards", "dimension", "encoder_fingerprint"}
        )
        return MemoryReply(
            snapshot=manifest.id,
            index=manifest.index.kind,
            bytes=manifest.bytes_by_part(),
            defaults=defaults.model_dump(mode="json", by_alias=True, exclude_none=True),
            limits=limits,
            **sizes,
        )

    @api.get("/v1/health")
    async def health() -> Status:
        """The ingress is up."""
        return Status(status="ok")

    @api.get("/v1/ready", responses=_errors())
    async def ready() -> Status:
        """The encoder and every shard answer, or did so a second ago."""
        await ingress.ready()
        return Status(status="ready")

    @api.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=security)


def _security(page: str) -> dict[str, str]:
    """Headers of the page, which is one file: its own script and style, its own server, nothing from outside."""
    allowed = []
    for tag in ("script", "style"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    policy = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {
        "Content-Security-Policy": f"default-src 'none'; {'; '.join(allowed)}; {policy}",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _add_errors(api: FastAPI) -> None:
    def problem(request: Request, status: int, title: str, detail: str, **more: Any) -> JSONResponse:
        said = Problem(title=title, status=status, detail=detail, request_id=request.state.request_id, **more)
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse(said.model_dump(exclude_none=True), status, headers, PROBLEM_TYPE.decode())

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(request, 422, "The request is not valid", say_errors(error.errors(), within=1))

    @api.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return problem(request, 422, "The request is not valid", str(error))

    @api.exception_handler(UnknownLabelError)
    async def unknown(request: Request, error: UnknownLabelError) -> JSONResponse:
        return problem(request, 404, "There is no such label", str(error))

    @api.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: StarletteHTTPException) -> JSONResponse:
        titles = {404: "Not found", 405: "Not a method of this resource"}
        reply = problem(request, error.status_code, titles.get(error.status_code, "Error"), error.detail)
        reply.headers.update(error.headers or {})
        return reply

    @api.exception_handler(MissingShardsError)
    async def missing(request: Request, error: MissingShardsError) -> JSONResponse:
        return problem(request, 503, "A shard did not answer", str(error), missing_shards=error.shards)

    @api.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> JSONResponse:
        return problem(request, 503, "Too late", "There was no answer in time; try again")

    @api.exception_handler(ray.exceptions.RayError)
    @api.exception_handler(RayServeException)
    async def lost(request: Request, error: Exception) -> JSONResponse:
        # No trace and no path leave the house; the log has them under the request's id.
        logger.error("request %s: %s", request.state.request_id, error)
        return problem(request, 503, "Not available", "A part of the application did not answer; try again")
