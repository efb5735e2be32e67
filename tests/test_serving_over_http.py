"""The HTTP endpoint gives the library's answers; a bad request gets an error that says what is wrong."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import schemathesis
from conftest import ROOT, Rounds, free_port
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

import raexmc_ray
from raexmc_ray.client import ApiError, AsyncClient, Client, UnreachableError
from raexmc_ray.recipe import Neighbours, PredictionSection, Recipe
from raexmc_ray.serve.rest import connect
from raexmc_ray.serve.run import serving
from raexmc_ray.serve.schema import Limits, PredictReply, ServeSettings

pytestmark = pytest.mark.ray
EXPORT_S = 11.0


@pytest.fixture(scope="module")
def memory(tiny_run: Recipe) -> raexmc_ray.Memory:
    return raexmc_ray.open(f"{tiny_run.cluster.storage}/memory")


def test_http_answers_equal_the_librarys(served: str, memory: raexmc_ray.Memory, tiny_texts: list[str]) -> None:
    asked = {"k": 5, "lambda": 0.3, "temperature": 0.1, "neighbours": {"instances": 20, "labels": 20}}
    reply = httpx.post(f"{served}/v1/predict", json={"texts": tiny_texts, "evidence": 2, **asked}, timeout=60).json()
    expected = memory.predict(
        tiny_texts, 5, lambda_=0.3, temperature=0.1, neighbours=Neighbours(instances=20, labels=20), evidence=2
    )
    assert reply["snapshot"] == memory.manifest.id
    assert set(reply["milliseconds"]) == {"queue", "encode", "search", "merge", "aggregate", "total"}
    for got, wanted in zip(reply["answers"], expected, strict=True):
        assert [label["uid"] for label in got["labels"]] == [label.uid for label in wanted]
        for label, other in zip(got["labels"], wanted, strict=True):
            assert label["score"] == pytest.approx(other.score, abs=1e-5)
            assert label["label_share"] == pytest.approx(other.label_share, abs=1e-4)
            assert [v["key_id"] for v in label["evidence"]] == [v.key_id for v in other.evidence or []]
            assert sum(v["share"] for v in label["evidence"]) <= 1 + 1e-5


def test_an_answer_does_not_depend_on_the_batch_it_rode_in(
    served: str, memory: raexmc_ray.Memory, tiny_texts: list[str]
) -> None:
    """Sixty-four callers at once, with settings of their own, each get what they would have got alone."""
    rng = random.Random(0)
    asked = [
        {
            "texts": rng.sample(tiny_texts, rng.choice([1, 1, 3])),
            "k": rng.choice([3, 10]),
            "lambda_": rng.choice([0.2, 0.5]),
            "neighbours": rng.choice([None, 40, Neighbours(instances=10, labels=10)]),
            "evidence": rng.choice([0, 2]),
        }
        for _ in range(64)
    ]

    async def ask() -> list:
        async with AsyncClient(served) as client:
            return await asyncio.gather(*(client.predict(**settings) for settings in asked))

    for settings_, reply in zip(asked, asyncio.run(ask()), strict=True):
        for got, wanted in zip(reply.answers, memory.predict(**settings_), strict=True):
            assert [label.uid for label in got.labels] == [label.uid for label in wanted]
            assert [label.score for label in got.labels] == pytest.approx([w.score for w in wanted], abs=1e-5)
            for label, other in zip(got.labels, wanted, strict=True):
                assert [v.key_id for v in label.evidence or []] == [v.key_id for v in other.evidence or []]


def test_defaults_are_the_snapshots(served: str, tiny_run: Recipe, tiny_texts: list[str]) -> None:
    with Client(served) as client:
        reply = client.predict(tiny_texts[:1])
    assert len(reply.answers[0].labels) == tiny_run.prediction.k
    assert reply.answers[0].labels[0].evidence is None
    assert reply.missing_shards == []


def test_filters_leave_scores_as_they_are(served: str, tiny_texts: list[str]) -> None:
    with Client(served) as client:
        every = client.predict(tiny_texts[:3], 1000)
        some = [label.uid for label in every.answers[0].labels[1:4]]
        allowed = client.predict(tiny_texts[:3], labels_allowed=some)
        blocked = client.predict(tiny_texts[:3], 1000, labels_blocked=some)
        for everything, only, without in zip(every.answers, allowed.answers, blocked.answers, strict=True):
            assert only.labels == [label for label in everything.labels if label.uid in some]
            assert without.labels == [label for label in everything.labels if label.uid not in some]
        with pytest.raises(ApiError, match=r"404 .*'no such label'"):
            client.predict(tiny_texts[:1], labels_allowed=["no such label"])


def test_labels_are_found_by_uid_and_by_how_they_begin(served: str, memory: raexmc_ray.Memory) -> None:
    rows = memory.labels.to_pylist()
    with Client(served) as client:
        for row in rows[:: len(rows) // 5]:
            found = client.label(row["uid"])
            assert (found.label, found.text) == (row["index"], row["text"])
            prefix = row["text"][:8]
            begins = {r["index"] for r in rows if (r["text"].lower() + "\0").startswith(prefix.lower())}
            begins |= {r["index"] for r in rows if r["uid"].startswith(prefix)}
            got = client.labels(prefix, limit=100)
            assert {label.label for label in got.labels} == begins
            prefix = prefix.swapcase()  # of a text in any case, of a uid as it is written
            begins = {r["index"] for r in rows if r["text"].lower().startswith(prefix.lower())}
            begins |= {r["index"] for r in rows if r["uid"].startswith(prefix)}
            assert {label.label for label in client.labels(prefix, limit=100).labels} == begins
        for other in (f"{rows[0]['uid']}\n", "\n", "a\nb"):
            with pytest.raises(ApiError, match=r"404 .*uid"):
                client.label(other)
        for uid in ("a/b c", ".", ".."):
            with pytest.raises(ApiError, match=f"no label of this memory has the uid '{re.escape(uid)}'"):
                client.label(uid)


def test_a_reply_is_bounded_as_a_whole(served: str) -> None:
    with Client(served) as client, pytest.raises(ApiError, match=r"422 .*is 25,856,000, more than the 100,000"):
        client.predict(["x"] * 256, 1000, evidence=100)


def test_a_cluster_that_serves_something_keeps_it(served: str, tiny_run: Recipe) -> None:
    settings = ServeSettings(memory=f"{tiny_run.cluster.storage}/memory")
    with pytest.raises(ValueError, match="serves raexmc already"), serving(settings, port=free_port()):
        pytest.fail("it served")
    assert httpx.get(f"{served}/v1/ready", timeout=60).status_code == 200


def test_a_port_on_which_another_one_serves_is_refused(tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # as for a cluster that is started here
    settings = ServeSettings(memory=f"{tiny_run.cluster.storage}/memory")
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:  # as Serve's own
        port = other.getsockname()[1]
        refused = pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be had \(Address already in use\)")
        with refused, serving(settings, port=port):
            pytest.fail("it served")


def test_memory_health_and_ready(served: str) -> None:
    with Client(served) as client:
        memory = client.memory()
    assert (memory.shards, memory.instances) == (3, 240)
    assert sum(memory.bytes.values()) > 0
    assert httpx.get(f"{served}/v1/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{served}/v1/ready", timeout=60).json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": ["  "]}, "texts"),
        ({"texts": ["x"] * 257}, "texts"),
        ({"texts": ["x"], "k": 0}, "k"),
        ({"texts": ["x"], "lambda": 1.5}, "lambda"),
        ({"texts": ["x"], "temperature": 0}, "temperature"),
        ({"texts": ["x"], "neighbours": {"joint": 0}}, "neighbours"),
        ({"texts": ["x"], "neighbours": {}}, "neighbours"),
        ({"texts": ["x"], "neighbours": {"joint": 16384}}, "neighbours: keys: 16,384 are more than the 2,000"),
        ({"texts": ["x"], "neighbors": {}}, "neighbors"),
        ({"texts": ["x" * 20_001]}, "texts"),
    ],
)
def test_a_bad_request_is_a_problem_that_names_the_field(served: str, body: dict, field: str) -> None:
    reply = httpx.post(f"{served}/v1/predict", json=body, timeout=60)
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["status"] == 422
    assert field in problem["detail"]
    assert problem["request_id"] == reply.headers["x-request-id"]


def test_what_is_no_request_at_all_is_a_problem(served: str) -> None:
    for method, path, content, status in (
        ("POST", "/v1/predict", b"{", 422),
        ("POST", "/v1/predict", b'{"texts": ["\xff"]}', 400),
        ("POST", "/v1/predict", b"[1]", 422),
        ("POST", "/v1/predict", b'{"texts": ["\\ud800"]}', 422),
        ("GET", "/v1/predict", b"", 405),
        ("GET", "/v2/nothing", b"", 404),
        ("GET", "/v1/labels", b"", 422),
        ("POST", "/v1/predict", b" " * (9 << 20), 413),
    ):
        headers = {"content-type": "application/json"}
        reply = httpx.request(method, f"{served}{path}", content=content, headers=headers, timeout=60)
        assert reply.status_code == status, (method, path, content[:20], reply.text)
        assert reply.headers["content-type"] == "application/problem+json"
        assert json.loads(reply.text)["status"] == status


@pytest.mark.slow
def test_random_bodies_never_break_it(served: str) -> None:
    """Valid bodies, some with bytes changed, cut or doubled, and JSON of any shape: no 5xx, only problems."""
    rng = random.Random(1)
    valid = json.dumps(
        {"texts": ["vim: an editor", "ünï"], "k": 3, "lambda": 0.5, "temperature": 0.1, "neighbours": {"joint": 9}}
    ).encode()
    values = [None, True, 0, -1, 1e308, 10**30, "", "x", "\ud83d", [], [[]], {}, {"joint": None}, ["x"] * 300, 0.5]
    names = ["texts", "k", "lambda", "lambda_", "temperature", "neighbours", "evidence", "labels_allowed", "x"]

    def body() -> bytes:
        if rng.random() < 0.5:
            return json.dumps({rng.choice(names): rng.choice(values) for _ in range(rng.randint(0, 4))}).encode()
        changed = bytearray(valid)
        for _ in range(rng.randint(0, 4)):
            at = rng.randrange(len(changed))
            if rng.random() < 0.5:
                changed[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                del changed[at : at + rng.randint(1, 9)]
            else:
                changed[at:at] = changed[: rng.randint(1, 40)]
        return bytes(changed)

    async def ask() -> list[httpx.Response]:
        gate = asyncio.Semaphore(32)
        async with httpx.AsyncClient(timeout=60) as http:

            async def one() -> httpx.Response:
                async with gate:
                    headers = {"content-type": "application/json"}
                    return await http.post(f"{served}/v1/predict", content=body(), headers=headers)

            return await asyncio.gather(*(one() for _ in range(500)))

    with Rounds("500_random_bodies", short=2) as rounds:
        for _ in rounds:
            replies = asyncio.run(ask())
            statuses = {reply.status_code for reply in replies}
            assert {200, 422} <= statuses <= {200, 400, 404, 422}, statuses
            for reply in replies:
                assert reply.status_code == 200 or reply.headers["content-type"] == "application/problem+json"
                assert "Traceback" not in reply.text
                assert "/raexmc_ray/" not in reply.text


def test_every_field_and_error_has_an_example(served: str) -> None:
    document = httpx.get(f"{served}/openapi.json", timeout=60).json()
    for name, model in document["components"]["schemas"].items():
        for field, schema in model.get("properties", {}).items():
            plain = schema.get("type") in ("string", "integer", "number") or "anyOf" in schema
            told = {"examples", "example", "default", "enum"} & set(schema)
            assert told or not plain or "$ref" in str(schema), f"{name}.{field}"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                assert status == "200" or response["content"]["application/problem+json"]["example"], (path, status)


def entries_of(body: Any) -> int:
    """What a request's reply may have, by its body; 0 of what is no body of a prediction."""
    if not isinstance(body, dict) or "texts" not in body:
        return 0
    return len(body["texts"]) * int(body.get("k") or PredictionSection().k) * (1 + int(body.get("evidence", 0)))


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_openapi_document_holds(served: str, mode: GenerationMode) -> None:
    """schemathesis, all its checks: what the document promises is what the application does, and what the document
    does not allow is refused."""
    for operation in schemathesis.openapi.from_url(f"{served}/openapi.json").get_all_operations():
        if mode is GenerationMode.NEGATIVE and not operation.ok().body and not operation.ok().query:
            continue  # there is nothing to be wrong

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.ok().as_strategy(mode))
        def check(case: schemathesis.Case) -> None:
            if mode is GenerationMode.POSITIVE and entries_of(case.body) > Limits().entries:
                assert case.call(timeout=60).status_code == 422, "a product: no schema can say it, its words do"
            else:
                case.call_and_validate(timeout=60)

        check()


def test_the_client_says_what_is_wrong(served: str, tiny_texts: list[str]) -> None:
    with Client(served) as client:
        with pytest.raises(ValueError, match="temperature"):
            client.predict(tiny_texts[:1], temperature=-1)
        with pytest.raises(TypeError, match=r"predict\(\[text\]\)"):
            client.predict("a text")
        with pytest.raises(TypeError, match=r"lists of uids: write \[uid\]"):
            client.predict(tiny_texts[:1], labels_blocked="vim")
        with pytest.raises(ApiError, match=r"422 .*2,000") as caught:
            client.predict(tiny_texts[:1], neighbours=16384)
        assert caught.value.problem.request_id
    with Client("http://127.0.0.1:9") as client, pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"):
        client.memory()


def exported() -> dict[str, float]:
    """What Prometheus would read now: {name and tags: value}; tags that the tests know nothing of are left out."""
    node = ray.nodes()[0]
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}", timeout=30).text
    found: Counter[str] = Counter()
    for name, tags, value in re.findall(r"^(ray_raexmc_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        known = sorted(re.findall(r'((?:le|path|shard|stage|status)="[^"]*")', tags))
        found[f"{name}{{{','.join(known)}}}"] += float(value)
    return found


def exported_when(ready: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The metrics as soon as they are so: Ray exports them every EXPORT_S."""
    for _ in range(60):
        if ready(found := exported()):
            return found
        time.sleep(0.5)
    pytest.fail(f"the metrics did not come: {found}")


def test_prometheus_has_what_the_dashboard_shows(served: str, tiny_texts: list[str]) -> None:
    with Client(served) as client:
        client.predict(tiny_texts[:4])
        client.label(client.labels(tiny_texts[0][:1] or "a", limit=1).labels[0].uid)
    shown = set(re.findall(r"ray_raexmc_\w+", (ROOT / "serve_configs/grafana.json").read_text()))
    rare = {"ray_raexmc_retries_total", "ray_raexmc_missing_shards_total"}  # there is nothing to count yet
    path = 'ray_raexmc_request_seconds_count{path="/v1/labels/{uid}"}'
    found = exported_when(lambda found: shown - rare <= {name.partition("{")[0] for name in found} and path in found)
    assert 'ray_raexmc_request_seconds_count{path="/v1"}' not in found


def test_a_burst_is_a_few_batches(served: str, tiny_texts: list[str]) -> None:
    """Sixty-four requests of a text each cost a few calls of the encoder, and of each shard."""
    answered = 'ray_raexmc_requests_total{status="200"}'
    counts = ["ray_raexmc_batch_texts_count{}"]  # a batch is a call of the encoder
    counts += [f'ray_raexmc_shard_search_seconds_count{{shard="{shard}"}}' for shard in range(3)]

    async def ask() -> None:
        async with AsyncClient(served) as client:
            await asyncio.gather(*(client.predict([text]) for text in (2 * tiny_texts)[:64]))

    with Client(served) as client:
        client.predict(tiny_texts[:1])
    before = exported_when(lambda found: answered in found and not time.sleep(EXPORT_S) and exported() == found)
    asyncio.run(ask())
    after = exported_when(lambda found: found[answered] >= before[answered] + 64)
    for count in counts:
        assert 2 <= after[count] - before[count] <= 20, count


def test_a_request_may_be_as_large_as_a_body_may_be(served: str, tiny_texts: list[str]) -> None:
    """What goes from process to process has no limit of its own below the API's."""
    limits = Limits()
    texts = ["é" * limits.characters] * (limits.body_bytes * 9 // 10 // (2 * limits.characters))
    with Client(served, timeout_s=60) as client:
        assert len(client.predict(texts, k=1).answers) == len(texts)


def test_query_prints_labels(served: str, tiny_texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from raexmc_ray.cli import app

    app(["query", tiny_texts[0], "--url", served, "--k", "3", "--evidence", "1"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert tiny_texts[0].split(":")[0] in printed
    assert "cosine" in printed


def test_a_client_gives_up_an_idle_connection_before_the_server_does(served: str) -> None:
    """What is sent on a connection that is just being closed is lost. Google's load balancers keep one for 600 s."""
    assert connect().get_serve_details()["http_options"]["keep_alive_timeout_s"] > 600


@pytest.mark.slow
def test_a_flood_is_refused_and_not_queued(served: str, tiny_texts: list[str]) -> None:
    """Of far more callers than there are places, some are answered and the rest told when to come again."""

    async def ask() -> list[PredictReply | BaseException]:
        async with AsyncClient(served) as client:
            calls = [client.predict([text], evidence=3) for text in 15 * tiny_texts]
            return await asyncio.gather(*calls, return_exceptions=True)

    replies = asyncio.run(ask())
    refused = [reply for reply in replies if isinstance(reply, ApiError)]
    answered = [reply for reply in replies if isinstance(reply, PredictReply)]
    assert len(refused) + len(answered) == len(replies) > 256
    assert len(answered) >= 128
    assert refused
    assert {(error.problem.status, error.problem.title, error.retry_after_s) for error in refused} == {
        (503, "Busy", 1.0)
    }
    assert len({error.problem.request_id for error in refused}) == len(refused), "the log has each by its id"
    refusals = 'ray_raexmc_requests_total{status="503"}'
    exported_when(lambda found: found.get(refusals, 0) >= len(refused))
    with Client(served) as client:
        client.predict(tiny_texts[:1])


def test_the_page_needs_nothing_from_outside(served: str) -> None:
    reply = httpx.get(served, timeout=60)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", reply.text)
    assert (Path(raexmc_ray.__file__).parent / "serve/page.html").read_text() == reply.text
