"""The library, which `raexmc evaluate` measures, `raexmc score` and the endpoint answer the same 500 texts alike."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CORPUS

import raexmc_ray
from raexmc_ray.client import Client
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.score.run import score

pytestmark = pytest.mark.ray
ROWS, K, TOLERANCE = 500, 10, 1e-5


def test_same_labels_and_scores(tiny_run: Recipe, served: str, tmp_path: Path) -> None:
    with gzip.open(CORPUS / "tst.json.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["title"] for _ in range(ROWS)]
    place = f"{tiny_run.cluster.storage}/memory"
    memory = raexmc_ray.open(place)
    ways = {"library": [[(one.uid, one.score) for one in labels] for labels in memory.predict(texts, K)]}

    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    score(
        Folder.at(place),
        [str(tmp_path / "texts.txt")],
        Folder.at(tmp_path / "out"),
        memory.settings(K),
        tiny_run.cluster,
    )
    scored = {row["id"]: row for row in pq.read_table(tmp_path / "out/predictions").to_pylist()}
    rows = [scored[str(number)] for number in range(1, ROWS + 1)]
    ways["score"] = [list(zip(row["label_uids"], row["scores"], strict=True)) for row in rows]

    with Client(served) as client:
        replies = [client.predict(texts[start : start + 250], K) for start in (0, 250)]
    answers = [answer for reply in replies for answer in reply.answers]
    ways["endpoint"] = [[(one.uid, one.score) for one in answer.labels] for answer in answers]

    for way in ("score", "endpoint"):
        for ours, others in zip(ways["library"], ways[way], strict=True):
            assert np.allclose([s for _, s in ours], [s for _, s in others], rtol=0, atol=TOLERANCE)
            # The order may differ only among labels whose scores are closer than rounding tells apart.
            expected = dict(ours)
            for (label, here), (other, there) in zip(ours, others, strict=True):
                assert label == other or abs(here - expected.get(other, there)) < TOLERANCE, (way, label, other)
