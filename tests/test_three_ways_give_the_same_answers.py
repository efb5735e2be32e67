"""`raexmc evaluate`, `raexmc score` and the endpoint answer the same 500 texts alike, and so have the same table."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import CORPUS

import raexmc_ray
from raexmc_ray.cli import main
from raexmc_ray.client import Client
from raexmc_ray.corpus import read_corpus
from raexmc_ray.evaluation import load
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.score.run import score

pytestmark = [pytest.mark.ray, pytest.mark.slow]
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


def test_the_main_table_is_the_same(
    tiny_run: Recipe, served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the commands: of the memory, of what was scored, and of what the endpoint said, filter pairs and all."""
    corpus, storage = tmp_path / "corpus", Path(tiny_run.cluster.storage)
    shutil.copytree(tiny_run.corpus.path, corpus)
    labels = read_corpus(corpus).labels["uid"].to_pylist()
    rows = first_rows(labels)
    (corpus / "tst.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    filtered = [(row, (7 * row + place) % len(labels)) for row in range(0, ROWS, 2) for place in (0, 5)]
    (corpus / "filter_labels_test.txt").write_text("".join(f"{row} {label}\n" for row, label in filtered))
    recipe = tmp_path / "recipe.yaml"
    content = tiny_run.model_dump(by_alias=True, mode="json")
    content["corpus"]["path"] = str(corpus)
    recipe.write_text(yaml.safe_dump(content))
    depth = 102  # two filter pairs a row

    command(["evaluate", "--recipe", str(recipe), "--output", str(tmp_path / "memory.json")])
    scored = ["--id-column", "uid", "--text-column", "title", "--k", str(depth), "--output", str(tmp_path / "scored")]
    command(["score", str(storage / "memory"), str(corpus / "tst.json"), *scored])
    with Client(served) as client:
        texts = [row["title"] for row in rows]
        replies = [client.predict(texts[start : start + 250], depth) for start in (0, 250)]
    place = {uid: label for label, uid in enumerate(labels)}
    said = [[place[one.uid] for one in answer.labels] for reply in replies for answer in reply.answers]
    (tmp_path / "said").mkdir()
    settings = tiny_run.prediction.model_copy(update={"k": depth}).model_dump_json(by_alias=True)
    table = pa.table({"id": [row["uid"] for row in rows], "labels": said}).replace_schema_metadata(
        {"settings": settings}
    )
    pq.write_table(table, tmp_path / "said/part.parquet")
    for way in ("scored", "said"):
        written = ["--predictions", str(tmp_path / way), "--output", str(tmp_path / f"{way}.json")]
        command(["evaluate", "--recipe", str(recipe), *written])
        capsys.readouterr()
        command(["compare", str(tmp_path / "memory.json"), str(tmp_path / f"{way}.json"), "--json"])
        differences = json.loads(capsys.readouterr().out)
        assert len(differences) == 14  # P, nDCG, PSP and PSnDCG at 1, 3 and 5; R@10 and R@100
        # One row of 500 is 0.2 percent of P@1: fewer than one changes its first label.
        assert all(abs(one["difference"]) < 0.1 for one in differences), differences
    measured = load(Folder.at(tmp_path / "memory.json"))
    assert measured.evaluation.evaluated > ROWS / 4
    assert measured.table["both"]["R@10"] > 5


def first_rows(labels: list[str]) -> list[dict]:
    """The first rows of the shipped test part, with those of their labels that are among `labels`."""
    with gzip.open(CORPUS / "lbl.json.gz", "rt", encoding="utf-8") as file:
        uids = [json.loads(line)["uid"] for line in file]
    place = {uid: label for label, uid in enumerate(labels)}
    with gzip.open(CORPUS / "tst.json.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(ROWS)]
    for row in rows:
        row["target_ind"] = [place[uids[target]] for target in row["target_ind"] if uids[target] in place]
    return rows


def command(arguments: list[str]) -> None:
    """`raexmc` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
