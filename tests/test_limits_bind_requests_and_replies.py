"""What an application allows binds what is asked, what the snapshot has where nothing is asked, and the reply."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from in_process import ingress_of

import raexmc_ray
from raexmc_ray.memory.shard import cut_texts
from raexmc_ray.recipe import Neighbours, PredictionSection
from raexmc_ray.serve.api import make_api
from raexmc_ray.serve.guard import Tokens
from raexmc_ray.serve.metrics import TEXTS
from raexmc_ray.serve.query import within
from raexmc_ray.serve.schema import Limits, ServeSettings

pytestmark = pytest.mark.ray
LIMITS = Limits(texts=2, characters=4, k=3, neighbours=5)


def ask(memory: Path, *bodies: dict[str, Any]) -> tuple[dict, dict, list[httpx.Response]]:
    """What the application with LIMITS says of its memory, of being ready, and of these bodies."""

    async def run() -> tuple[dict, dict, list[httpx.Response]]:
        settings = ServeSettings(memory=str(memory), limits=LIMITS)
        transport = httpx.ASGITransport(make_api(await ingress_of(settings), settings, Tokens(None)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as http:
            replies = [await http.post("/v1/predict", json=body) for body in bodies]
            return (await http.get("/v1/memory")).json(), (await http.get("/v1/ready")).json(), replies

    return asyncio.run(run())


def test_who_asks_for_nothing_gets_no_more_than_is_allowed(small_memory: Path) -> None:
    memory, ready, (reply, explicit) = ask(
        small_memory, {"texts": ["vim"]}, {"texts": ["vim"], "k": 3, "neighbours": {"joint": 5}}
    )
    assert memory["defaults"]["k"] == 3
    assert memory["defaults"]["neighbours"] == {"joint": 5}
    assert ready == {"status": "ready"}
    assert len(reply.json()["answers"][0]["labels"]) == 3
    assert reply.json()["answers"] == explicit.json()["answers"], "the limit is what is retrieved"


def test_more_is_refused_before_a_label_is_looked_up(small_memory: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"texts": ["a", "b", "c"]}, "texts: texts: 3 are more than the 2 "),
        ({"texts": ["vim", "emacs"]}, "texts: characters in a text: 5 are more than the 4 "),
        ({"texts": ["vim"], "k": 4}, "k: labels: 4 are more than the 3 "),
        ({"texts": ["vim"], "neighbours": {"joint": 6}}, "neighbours: keys: 6 are more than the 5 "),
        ({"texts": ["vim"], "neighbours": {"instances": 5, "labels": 6}}, "neighbours: keys: 6 are more than the 5 "),
    ]
    unknown = {"labels_allowed": ["no such label"]}
    _, _, replies = ask(small_memory, *({**asked, **more} for more in ({}, unknown) for asked, _ in refused))
    for (_, said), reply in zip(2 * refused, replies, strict=True):
        assert reply.status_code == 422
        assert said in reply.json()["detail"]


def test_texts_of_a_reply_are_cut(small_memory: Path) -> None:
    """Of labels and of keys, which may be as long as a corpus has them; one label has the whole."""
    settings = ServeSettings(memory=str(small_memory), limits=Limits(reply_characters=12))
    opened = raexmc_ray.open(small_memory)
    whole = dict(zip(*opened.labels.select(["uid", "text"]).to_pydict().values(), strict=True))

    async def run() -> list[dict]:
        transport = httpx.ASGITransport(make_api(await ingress_of(settings), settings, Tokens(None)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as http:
            body = {"texts": ["vim: an editor"], "evidence": 3}
            (answer,) = (await http.post("/v1/predict", json=body)).json()["answers"]
            listed = (await http.get("/v1/labels", params={"prefix": "l", "limit": 20})).json()["labels"]
            one = (await http.get(f"/v1/labels/{answer['labels'][0]['uid']}")).json()
            return [answer["labels"], listed, one]

    answered, listed, one = asyncio.run(run())
    assert one["text"] == whole[one["uid"]]
    assert len(one["text"]) > 12
    for label in (*answered, *listed):
        assert label["text"] == shortened(whole[label["uid"]])
    keys = opened.shards.keys(np.array([vote["key_id"] for label in answered for vote in label["evidence"]]))
    for vote in (vote for label in answered for vote in label["evidence"]):
        assert vote["text"] == shortened(keys[vote["key_id"]]["text"])


def shortened(text: str) -> str:
    return text if len(text) <= 12 else text[:11] + "…"


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_a_text_is_cut_by_characters(type_: pa.DataType) -> None:
    texts = ["", "abc", "abcd", "ÄÖÜ", "ÄÖÜß", "👩‍🚀x"]
    table = pa.table({"uid": list("abcdef"), "text": pa.array(texts, type_), "more": range(6)})
    cut = cut_texts(table, 3)
    assert cut["text"].to_pylist() == ["", "abc", "ab…", "ÄÖÜ", "ÄÖ…", "👩\u200d…"]
    assert cut.schema == table.schema
    assert cut.drop_columns("text") == table.drop_columns("text")
    assert cut_texts(table, 1)["text"].to_pylist() == ["", *5 * ["…"]]
    assert cut_texts(table, 4) is table
    assert cut_texts(table.slice(0, 0), 3).num_rows == 0


def test_each_kind_of_neighbours_is_cut_for_itself() -> None:
    apart = PredictionSection(neighbours=Neighbours(instances=9, labels=0), k=2)
    assert within(LIMITS, apart) == PredictionSection(neighbours=Neighbours(instances=5, labels=0), k=2)
    labels = PredictionSection(neighbours=Neighbours(labels=9))
    assert within(LIMITS, labels) == PredictionSection(neighbours=Neighbours(labels=5), k=3)
    fits = PredictionSection(neighbours=Neighbours(joint=5), k=3)
    assert within(LIMITS, fits) == fits


def test_the_largest_batch_is_seen_in_its_size() -> None:
    (largest,) = [bound.le for bound in ServeSettings.model_fields["batch_texts"].metadata if hasattr(bound, "le")]
    assert largest == TEXTS[-1]
