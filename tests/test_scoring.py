"""Offline scoring gives the library's answers, each row once, and goes on where it was stopped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raexmc_ray
from raexmc_ray import score as score_module
from raexmc_ray.corpus import read_corpus
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.score import score

pytestmark = pytest.mark.ray


def run(recipe: Recipe, inputs: list[Path], output: Path) -> dict[Path, bytes]:
    rows = score(
        Folder.at(recipe.cluster.storage) / "memory",
        [str(path) for path in inputs],
        Folder.at(output),
        recipe.prediction,
        recipe.cluster,
    )
    files = {path: path.read_bytes() for path in sorted(output.rglob("*.parquet"))}
    assert sum(len(pq.read_table(path)) for path in files) == rows
    return files


def test_scores_equal_the_librarys_and_a_rerun_computes_what_is_missing(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "UNIT_ROWS", 16)
    texts = read_corpus(tiny_run.corpus.path).test.texts["text"].to_pylist()
    table, lines = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    pq.write_table(pa.table({"id": [f"a{i}" for i in range(len(texts))], "text": texts}), table)
    lines.write_text("".join(json.dumps({"id": f"b{i}", "text": t}) + "\n" for i, t in enumerate(texts[:5])))
    files = run(tiny_run, [table, lines], tmp_path / "out")
    assert len(files) == 4

    first = pq.read_table(next(iter(files)))
    memory = raexmc_ray.open(f"{tiny_run.cluster.storage}/memory")
    assert first.schema.metadata[b"snapshot"].decode() == memory.manifest.id
    for row, labels in zip(first.to_pylist(), memory.predict(texts[:16]), strict=True):
        assert row["label_uids"] == [label.uid for label in labels]
        assert np.allclose(row["scores"], [label.score for label in labels], atol=1e-5)

    lost = next(iter(files))
    lost.unlink()
    assert run(tiny_run, [table, lines], tmp_path / "out") == files


def test_bad_input_is_refused_by_name(tiny_run: Recipe, tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"id": "1", "text": "vim"}\n{"id": "2", "text": " "}\n')
    with pytest.raises(ValueError, match=r"blank.jsonl, row 2, column 'text'"):
        run(tiny_run, [blank], tmp_path / "out")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"name": "1"}\n')
    with pytest.raises(ValueError, match="--id-column"):
        run(tiny_run, [wrong], tmp_path / "out")
    for name, content in (
        ("torn.parquet", b"PAR1 and then nothing"),
        ("torn.txt.gz", gzip.compress(b"vim\n" * 100)[:-12]),
        ("latin1.txt", "Café\n".encode("latin-1")),
        ("torn.jsonl", b'{"id": "1", "te'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: is torn, or no"):
            run(tiny_run, [tmp_path / name], tmp_path / "out")
    with pytest.raises(ValueError, match="expected a file"):
        run(tiny_run, [tmp_path / "none.parquet"], tmp_path / "out")
