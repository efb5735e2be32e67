"""What stands before the API: tokens, and bounds on what comes in. The real middleware, around a small application."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raexmc_ray.serve.api import make_api
from raexmc_ray.serve.gate import GATHER_S, SPARE, Gate
from raexmc_ray.serve.guard import Guard, Tokens, is_loopback, refuse_open_door
from raexmc_ray.serve.ingress import READY_S, Ingress
from raexmc_ray.serve.run import url_of
from raexmc_ray.serve.schema import Limits, PredictRequest, ServeSettings

OLD, NEW = "old-token-0123456789", "new-token-9876543210"


async def _read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def _slow(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.2)
    return PlainTextResponse("done")


def client(limits: Limits, tokens: Tokens, body_s: float = 15.0) -> httpx.AsyncClient:
    routes = [Route("/v1/predict", _read, methods=["POST"]), Route("/v1/slow", _slow), Route("/v1/health", _slow)]
    return talk_to(Guard(Starlette(routes=routes), limits, tokens, lambda *_: None, body_s))


def talk_to(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_tokens_can_be_rotated_in_a_file_that_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raexmc_ray.serve.guard.REREAD_S", 0.0)
    file = tmp_path / "tokens"
    file.write_text(f"# ours\n{OLD}\n")

    def write(text: str, at: int) -> None:
        file.write_text(text)
        os.utime(file, (at, at))

    async def run() -> None:
        async with client(Limits(), Tokens(str(file))) as http:

            async def status(headers: dict[str, str]) -> int:
                return (await http.get("/v1/slow", headers=headers)).status_code

            assert [await status(bearer(OLD)), await status(bearer(NEW)), await status({})] == [200, 401, 401]
            write(f"{OLD}\n{NEW}\n", 1)
            assert [await status(bearer(OLD)), await status(bearer(NEW))] == [200, 200]
            write(f"{NEW}\n", 2)
            assert [await status(bearer(OLD)), await status(bearer(NEW))] == [401, 200]
            write("short\n", 3)  # a mistake locks nobody out
            assert [await status(bearer(OLD)), await status(bearer(NEW))] == [401, 200]
            refused = await http.get("/v1/slow", headers={"authorization": f"Basic {NEW}"})
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert NEW not in refused.text
            assert (await http.get("/v1/health")).status_code == 200, "a load balancer has no token"

    asyncio.run(run())


def test_tokens_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAEXMC_TOKENS", f"{OLD},{NEW}")
    tokens = Tokens(None)
    assert tokens
    assert tokens.find(f"Bearer {OLD}".encode()) != tokens.find(f"bearer {NEW}".encode()) is not None
    assert tokens.find(b"Bearer ") is None
    assert tokens.find("Bearer ü".encode("latin-1")) is None
    monkeypatch.setenv("RAEXMC_TOKENS", "short")
    with pytest.raises(ValueError, match=r"RAEXMC_TOKENS: token 1 must have 16 .*openssl"):
        Tokens(None)


def test_an_open_door_is_refused(tmp_path: Path) -> None:
    settings, none = ServeSettings(memory="m"), Tokens(None)
    for host in ("0.0.0.0", None, "10.0.0.1", "::", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ValueError, match="tokens_file"):
            refuse_open_door(settings, none, host)
        refuse_open_door(ServeSettings(memory="m", anonymous_access=True), none, host)
        (tmp_path / "tokens").write_text(OLD)
        refuse_open_door(settings, Tokens(str(tmp_path / "tokens")), host)
    for host in ("127.0.0.1", "localhost", "::1"):
        refuse_open_door(settings, none, host)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "example.org"])
def test_the_url_that_is_said_can_be_opened(host: str) -> None:
    url = httpx.URL(url_of(host, 8000))
    assert (url.host, url.port) == ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), 8000)


def test_bodies_are_bounded_whether_they_say_their_length_or_not() -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1024):
            yield b"x" * 1024

    async def run() -> None:
        async with client(Limits(body_bytes=4096), Tokens(None)) as http:
            assert (await http.post("/v1/predict", content=b"x" * 4096)).text == "4096"
            assert (await http.post("/v1/predict", content=chunks(4096))).text == "4096"
            for body in (b"x" * 4097, chunks(8192)):
                reply = await http.post("/v1/predict", content=body)
                assert reply.status_code == 413
                assert reply.headers["content-type"] == "application/problem+json"
                assert "4,096" in reply.json()["detail"]

    asyncio.run(run())


def test_a_body_that_does_not_end_is_given_up() -> None:
    """Its place, of the few that there are at a time, is for others."""

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(3600)

    async def run() -> None:
        async with client(Limits(), Tokens(None), body_s=0.2) as http:
            reply = await asyncio.wait_for(http.post("/v1/predict", content=slow()), 10)
            assert reply.status_code == 408
            assert reply.headers["content-type"] == "application/problem+json"
            assert reply.headers["connection"] == "close"
            assert "0.2 seconds" in reply.json()["detail"]
            assert (await http.post("/v1/predict", content=b"xy")).text == "2"

    asyncio.run(run())


def test_a_mistake_of_ours_is_a_problem_and_is_counted_as_one(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[tuple[str, int]] = []

    class Ingress:
        view = SimpleNamespace(manifest=SimpleNamespace(id="s"))

        async def predict(self, *_: object) -> None:
            raise KeyError("/secret/path")

        def answered(self, path: str, status: int, seconds: float) -> None:
            counted.append((path, status))

    async def run() -> httpx.Response:
        api = make_api(Ingress(), ServeSettings(memory="m"), Tokens(None))  # type: ignore[arg-type]
        async with talk_to(api) as http:
            return await http.post("/v1/predict", json={"texts": ["x"]}, headers={"x-request-id": "abc-123"})

    with caplog.at_level(logging.INFO, logger="ray.serve.access"):
        reply = asyncio.run(run())
    assert reply.status_code == 500
    assert reply.json()["request_id"] == "abc-123"
    assert "secret" not in reply.text
    assert counted == [("/v1/predict", 500)]
    traced, entry = caplog.records
    assert "abc-123" in traced.message
    assert traced.exc_info
    assert json.loads(entry.message)["status"] == 500


def test_a_path_that_there_is_not_leads_nowhere() -> None:
    counted: list[tuple[str, int]] = []
    ingress = SimpleNamespace(answered=lambda path, status, _: counted.append((path, status)))

    async def run() -> list[httpx.Response]:
        async with talk_to(make_api(ingress, ServeSettings(memory="m"), Tokens(None))) as http:  # type: ignore[arg-type]
            return [await http.get(path) for path in ("/v1/health/", "/v1/health///", "/v1/memory/", "/v1/health")]

    replies = asyncio.run(run())
    assert [reply.status_code for reply in replies] == [404, 404, 404, 200]
    assert {reply.headers["content-type"] for reply in replies[:3]} == {"application/problem+json"}
    assert [path for path, status in counted if status < 400] == ["/v1/health"], "each is a tag of the metrics"


def test_the_gate_names_counts_and_logs_what_it_refuses(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[int] = []
    app = Gate(Starlette(routes=[Route("/v1/slow", _slow)]), 1, counted.append)

    async def run() -> list[httpx.Response]:
        async with talk_to(app) as http:
            replies = []
            for headers in ({}, {"x-request-id": "abc-123"}), ({"x-request-id": "later"},):
                first = asyncio.ensure_future(http.get("/v1/slow"))
                await asyncio.sleep(0.05)
                replies += [await http.get("/v1/slow", headers=some) for some in headers]
                assert (await first).status_code == 200
                await asyncio.sleep(2 * GATHER_S)
            return replies

    with caplog.at_level(logging.INFO, logger="ray.serve.access"):
        unnamed, *named = replies = asyncio.run(run())
    assert [reply.status_code for reply in replies] == [503, 503, 503]
    for name, reply in zip(("abc-123", "later"), named, strict=True):
        assert reply.json()["request_id"] == reply.headers["x-request-id"] == name
    assert unnamed.json()["request_id"] == unnamed.headers["x-request-id"] != ""
    assert counted == [2, 1]
    together, alone = [json.loads(record.message) for record in caplog.records]
    assert [entry["request"] for entry in together["refused"]] == [unnamed.headers["x-request-id"], "abc-123"]
    assert [(entry["request"], entry["path"]) for entry in alone["refused"]] == [("later", "/v1/slow")]
    assert together["status"] == alone["status"] == 503


def test_the_gate_answers_where_serve_has_only_its_own_words(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[int] = []

    replies = {
        "/v1/lost": PlainTextResponse("ActorDiedError: /a/secret/path", 500),
        "/v1/ours": Response('{"status": 500}', 500, media_type="application/problem+json"),
        "/v1/json": Response('{"status": 502}', 502, media_type="application/json"),
        "/another": PlainTextResponse("another application's", 500),
    }

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if reply := replies.get(scope["path"]):
            await reply(scope, receive, send)  # else nothing: so it is where a replica is lost before it has answered

    app = Gate(serve, 1, counted.append)

    async def run() -> list[httpx.Response]:
        async with talk_to(app) as http:
            paths = ("/v1/lost", "/v1/silent", "/v1/ours", "/v1/json", "/another")
            found = [await http.get(path, headers={"x-request-id": path}) for path in paths]
            await asyncio.sleep(2 * GATHER_S)
            return found

    with caplog.at_level(logging.INFO, logger="ray.serve.access"):
        lost, silent, *others = asyncio.run(run())
    for reply in (lost, silent):
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["title"] == "Not available"
        assert "secret" not in reply.text
    assert [reply.text for reply in others] == ['{"status": 500}', '{"status": 502}', "another application's"]
    assert counted == [2], "ours are counted where they are made"
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert [entry["request"] for entry in line["refused"]] == ["/v1/lost", "/v1/silent"]


def test_the_gate_leaves_other_applications_alone() -> None:
    """They neither take places of ours nor are refused for what we are asked."""

    async def run() -> list[int]:
        come, go = asyncio.Semaphore(0), asyncio.Event()

        async def held(request: Request) -> PlainTextResponse:
            come.release()
            await go.wait()
            return PlainTextResponse("done")

        paths = ["/another", "/another/v1/predict", "/v1x", "/-/routes", "/v1/predict"]
        app = Starlette(routes=[Route(path, held) for path in paths])
        async with talk_to(Gate(app, 1, lambda *_: None)) as http:
            asked = [asyncio.ensure_future(http.get(path)) for path in (*paths, "/another")]
            for _ in asked:
                await come.acquire()
            refused = [(await http.get(path)).status_code for path in ("/", "/openapi.json", "/v1/labels/x")]
            go.set()
            return [*refused, *(reply.status_code for reply in await asyncio.gather(*asked))]

    assert asyncio.run(asyncio.wait_for(run(), 30)) == 3 * [503] + 6 * [200]


def test_a_prefix_changes_nothing_behind_it(tmp_path: Path) -> None:
    """Serve tells an application of its `route_prefix` as ASGI's `root_path`."""
    counted: list[tuple[str, int]] = []
    (tmp_path / "tokens").write_text(OLD)
    settings = ServeSettings(memory="m", tokens_file=str(tmp_path / "tokens"))
    ingress = SimpleNamespace(answered=lambda path, status, _: counted.append((path, status)))
    api = make_api(ingress, settings, Tokens(settings.tokens_file))  # type: ignore[arg-type]

    async def run(prefix: str) -> list[int]:
        transport = httpx.ASGITransport(api, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            paths = ("/", "/openapi.json", "/v1/health", "/v1/memory")
            return [(await http.get(prefix + path)).status_code for path in paths]

    for prefix in ("", "/raexmc", "/v1"):
        assert asyncio.run(run(prefix)) == [200, 200, 200, 401], prefix
        assert counted == [("/", 200), ("/openapi.json", 200), ("/v1/health", 200), ("/v1/memory", 401)]
        counted.clear()


def test_the_gate_keeps_room_for_probes() -> None:
    """What is busy is alive; yet probes are no way around the gate."""

    async def run() -> tuple[int, list[int]]:
        come, go = asyncio.Semaphore(0), asyncio.Event()

        async def held(request: Request) -> PlainTextResponse:
            come.release()
            await go.wait()
            return PlainTextResponse("done")

        routes = [Route("/v1/predict", held), Route("/v1/health", held)]
        async with talk_to(Gate(Starlette(routes=routes), 1, lambda *_: None)) as http:
            paths = ["/v1/predict", *["/v1/health"] * SPARE]
            held_up = [asyncio.ensure_future(http.get(path)) for path in paths]
            for _ in paths:
                await come.acquire()
            beyond = await http.get("/v1/health")
            go.set()
            return beyond.status_code, [reply.status_code for reply in await asyncio.gather(*held_up)]

    assert asyncio.run(run()) == (503, [200] * (1 + SPARE))


def test_a_caller_that_left_is_no_refusal() -> None:
    counted: list[int] = []

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def nothing(message: Message) -> None:
        pytest.fail("there is nobody to tell")

    gate = Gate(serve, 1, counted.append)
    asyncio.run(gate({"type": "http", "path": "/v1/predict", "headers": [], "method": "POST"}, gone, nothing))
    assert counted == gate._refused == []


def test_whether_it_is_ready_is_asked_once_for_all_who_want_to_know() -> None:
    asked: list[float] = []

    async def predict(request: PredictRequest, request_id: str, started: float, entry: dict) -> None:
        asked.append(started)
        await asyncio.sleep(0.1)
        if len(asked) == 2:
            raise TimeoutError

    plain = Ingress.func_or_class.__bases__[0]  # without what Serve wraps around it
    ingress = plain.__new__(plain)
    ingress._probe, ingress._probed, ingress.predict = None, 0.0, predict

    async def run() -> None:
        impatient = asyncio.create_task(ingress.ready())
        await asyncio.sleep(0.01)
        impatient.cancel()  # which must not end it for the others
        await asyncio.gather(*(ingress.ready() for _ in range(100)))
        await ingress.ready()
        assert len(asked) == 1
        await asyncio.sleep(READY_S)
        answers = await asyncio.gather(*(ingress.ready() for _ in range(10)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [TimeoutError] * 10
        assert len(asked) == 2

    asyncio.run(run())


def test_each_token_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAEXMC_TOKENS", f"{OLD},{NEW}")

    async def run() -> None:
        async with client(Limits(requests_per_second=2), Tokens(None)) as http:
            calls = [http.post("/v1/predict", headers=bearer(token)) for token in (OLD, OLD, OLD, NEW)]
            replies = await asyncio.gather(*calls)
            assert [reply.status_code for reply in replies] == [200, 200, 429, 200]
            assert replies[2].headers["retry-after"] == "1"
            assert {(await http.get("/v1/health")).status_code for _ in range(5)} == {200}, "what probes is not counted"
            await asyncio.sleep(1.1)
            assert (await http.post("/v1/predict", headers=bearer(OLD))).status_code == 200

    asyncio.run(run())


def test_the_access_log_follows_a_request_and_has_no_text(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with client(Limits(body_bytes=2048), Tokens(None)) as http:
            await http.post("/v1/predict?secret=1", content=b"secret", headers={"x-request-id": "abc-123"})
            await http.post("/v1/predict", content=b"x" * 4096, headers={"x-request-id": 'forged", "status": 200'})

    with caplog.at_level(logging.INFO, logger="ray.serve.access"):
        asyncio.run(run())
    first, second = [json.loads(record.message) for record in caplog.records]
    assert (first["request"], first["path"], first["status"]) == ("abc-123", "/v1/predict", 200)
    assert first["ms"] >= 0
    assert (second["request"], second["status"]) == ('forged", "status": 200', 413)
    assert "secret" not in caplog.text
