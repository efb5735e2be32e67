"""The HTTP endpoint gives the library's answers; a bad request gets an error that says what is wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.recipe import Neighbours, Recipe
from raexmc_ray.serve.run import serving
from raexmc_ray.serve.schema import ServeSettings

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def url(tiny_run: Recipe) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(ServeSettings(memory=f"{tiny_run.cluster.storage}/memory"), port=port) as address:
        yield address


@pytest.fixture(scope="module")
def texts(tiny_run: Recipe) -> list[str]:
    return read_corpus(tiny_run.corpus.path).test.texts["text"].to_pylist()[:20]


def test_http_answers_equal_the_librarys(url: str, tiny_run: Recipe, texts: list[str]) -> None:
    memory = raexmc_ray.open(f"{tiny_run.cluster.storage}/memory")
    settings = {"k": 5, "lambda": 0.3, "temperature": 0.1, "neighbours": {"instances": 20, "labels": 20}}
    reply = httpx.post(f"{url}/v1/predict", json={"texts": texts, "evidence": 2, **settings}, timeout=60).json()
    expected = memory.predict(
        texts, 5, lambda_=0.3, temperature=0.1, neighbours=Neighbours(instances=20, labels=20), evidence=2
    )
    assert reply["snapshot"] == memory.manifest.id
    assert set(reply["milliseconds"]) == {"queue", "encode", "search", "aggregate", "total"}
    for got, wanted in zip(reply["answers"], expected, strict=True):
        assert [label["uid"] for label in got["labels"]] == [label.uid for label in wanted]
        for label, other in zip(got["labels"], wanted, strict=True):
            assert label["score"] == pytest.approx(other.score, abs=1e-5)
            assert [v["key_id"] for v in label["evidence"]] == [v.key_id for v in other.evidence or []]
            assert sum(v["share"] for v in label["evidence"]) <= 1 + 1e-5


def test_defaults_are_the_snapshots(url: str, tiny_run: Recipe, texts: list[str]) -> None:
    reply = httpx.post(f"{url}/v1/predict", json={"texts": texts[:1]}, timeout=60).json()
    assert len(reply["answers"][0]["labels"]) == tiny_run.prediction.k
    assert reply["answers"][0]["labels"][0]["evidence"] is None


def test_memory_health_and_ready(url: str) -> None:
    memory = httpx.get(f"{url}/v1/memory", timeout=60).json()
    assert memory["shards"] == 3
    assert memory["instances"] == 240
    assert httpx.get(f"{url}/v1/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/ready", timeout=60).json() == {"status": "ready"}
    assert "/v1/predict" in httpx.get(f"{url}/openapi.json", timeout=60).json()["paths"]


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
        ({"texts": ["x"], "neighbors": {}}, "neighbors"),
    ],
)
def test_a_bad_request_is_a_problem_that_names_the_field(url: str, body: dict, field: str) -> None:
    reply = httpx.post(f"{url}/v1/predict", json=body, timeout=60)
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["status"] == 422
    assert field in problem["detail"]


def test_broken_json_is_a_problem(url: str) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{url}/v1/predict", content=b"{", headers=headers, timeout=60)
    assert reply.status_code == 422
    assert json.loads(reply.text)["title"] == "The request is not valid"


def test_query_prints_labels(url: str, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from raexmc_ray.cli import app

    app(["query", texts[0], "--url", url, "--k", "3", "--evidence", "1"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert texts[0].split(":")[0] in printed
    assert "cosine" in printed
