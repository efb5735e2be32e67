"""Predictions in files are measured as the memory is that made them; what is missing, doubled or foreign is refused."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from helpers import corpus_of, random_relevance, tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

import raexmc_ray
from raexmc_ray.corpus import Corpus, Split, read_corpus
from raexmc_ray.corpus.types import pair_matrix
from raexmc_ray.evaluation import evaluate, predictions
from raexmc_ray.evaluation.compare import compare
from raexmc_ray.evaluation.predictions import PredictedRows, by_row, evaluate_predictions
from raexmc_ray.files import Folder
from raexmc_ray.inputs.find import find_inputs
from raexmc_ray.inputs.rows import Columns
from raexmc_ray.inputs.units import Unit, UnitReader, cut_file
from raexmc_ray.memory.write import build_memory
from raexmc_ray.predict import aggregate
from raexmc_ray.recipe import CorpusSection, Neighbours, PredictionSection, Recipe

SETTINGS = PredictionSection(temperature=0.08, neighbours=Neighbours(joint=80))
SECTION = CorpusSection(path="anywhere")


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    """The tiny corpus; each row's first label and one more are filter pairs of every second row."""
    read = read_corpus(tiny_corpus)
    rows = np.repeat(np.arange(0, len(read.test), 2), 2)
    labels = np.tile([3, 7], len(rows) // 2)
    filtered = pair_matrix(rows, labels, read.test.relevance.shape)
    return Corpus(read.train, Split(read.test.texts, read.test.relevance, filtered), read.labels)


@pytest.fixture(scope="module")
def memory(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> raexmc_ray.Memory:
    folder = tmp_path_factory.mktemp("memory")
    build_memory(corpus, tiny_encoder(), folder, defaults=SETTINGS)
    return raexmc_ray.open(folder)


def write(memory: raexmc_ray.Memory, corpus: Corpus, folder: Path, k: int) -> list[Path]:
    """Predictions as `raexmc score` writes them: three files in folders, rows in another order than the corpus's."""
    queries = memory.encoder.encode(corpus.test.texts["text"].to_pylist())
    found = aggregate(memory.search(queries, SETTINGS.neighbours), lambda_=0.5, temperature=0.08, k=k)
    kept = found.labels_Bk >= 0
    labels = [row[there].tolist() for row, there in zip(found.labels_Bk, kept, strict=True)]
    scores = [row[there].tolist() for row, there in zip(found.scores_Bk, kept, strict=True)]
    settings = SETTINGS.model_copy(update={"k": k}).model_dump_json(by_alias=True)
    job = f'{{"evidence": 0, "settings": {settings}}}'
    metadata = {"snapshot": memory.manifest.id, "settings": job}
    order = np.random.default_rng(0).permutation(len(labels))
    paths = []
    for number, rows in enumerate(np.array_split(order, 3)):
        columns = {
            "id": corpus.test.texts["uid"].take(rows),
            "labels": pa.array([labels[row] for row in rows], pa.list_(pa.int64())),
            "scores": pa.array([scores[row] for row in rows], pa.list_(pa.float32())),
        }
        paths.append(folder / f"run/{number}/part-{number}.parquet")
        paths[-1].parent.mkdir(parents=True)
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), paths[-1])
    rejected = folder / "run/rejected/part.parquet"
    rejected.parent.mkdir()
    pq.write_table(pa.table({"id": ["none"], "reason": ["empty"]}), rejected)
    return paths


def test_deep_predictions_give_the_row_both(memory: raexmc_ray.Memory, corpus: Corpus, tmp_path: Path) -> None:
    write(memory, corpus, tmp_path, 102)
    run = Recipe.parse({"corpus": {"path": "here"}})
    of_files = evaluate_predictions(Folder.at(tmp_path), corpus, SECTION, recipe=run)
    of_memory = evaluate(memory, corpus, SECTION, SETTINGS)
    assert list(of_files.table) == ["popularity", "both"]
    for row, figures in of_files.table.items():
        assert figures == of_memory.table[row]
    assert of_files.evaluation.snapshot == memory.manifest.id
    assert of_files.evaluation.settings == SETTINGS.model_copy(update={"k": 102})
    recorded = of_files.evaluation.recipe
    assert recorded
    assert list(recorded) == ["corpus", "prediction", "cluster"], "files do not say how their memory was made"
    assert recorded["prediction"]["k"] == 102
    for one in compare(of_memory, of_files, resamples=50):
        assert one.difference == one.low == one.high == 0


def test_shallow_ones_give_what_can_be_computed(
    memory: raexmc_ray.Memory, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(memory, corpus, tmp_path, 12)
    of_memory = evaluate(memory, corpus, SECTION, SETTINGS).table["both"]
    with caplog.at_level(logging.WARNING):
        figures = evaluate_predictions(Folder.at(tmp_path), corpus, SECTION).table["both"]
    assert figures == {name: value for name, value in of_memory.items() if name != "R@100"}
    assert "--k 102" in caplog.text
    shallow = tmp_path / "shallow"
    write(memory, corpus, shallow, 4)
    assert "P@1" in evaluate_predictions(Folder.at(shallow), corpus, SECTION).table["both"]
    assert "P@5" not in evaluate_predictions(Folder.at(shallow), corpus, SECTION).table["both"]


def test_rows_with_fewer_predictions_than_were_asked_for_are_whole(corpus: Corpus, tmp_path: Path) -> None:
    """One label each, of a hundred and two that were asked for: there were no more, and every metric is defined."""
    labels = [[int(row.indices[0])] if row.nnz else [] for row in corpus.test.relevance]
    table = pa.table({"id": corpus.test.texts["uid"], "labels": pa.array(labels, pa.list_(pa.int64()))})
    settings = SETTINGS.model_copy(update={"k": 102}).model_dump_json(by_alias=True)
    pq.write_table(table.replace_schema_metadata({"settings": settings}), tmp_path / "a.parquet")
    plain = Corpus(
        corpus.train, Split(corpus.test.texts, corpus.test.relevance, 0 * corpus.test.filtered), corpus.labels
    )
    figures = evaluate_predictions(Folder.at(tmp_path), plain, SECTION).table["both"]
    assert figures["P@1"] == 100
    assert figures["P@5"] == pytest.approx(20)
    assert 0 < figures["R@100"] == figures["R@10"]


def written(rng: np.random.Generator, rows: int, labels: int, k: int, fewer: bool) -> tuple[PredictedRows, Corpus]:
    """Predictions in another order than that of the test rows, k a row or with `fewer` some less; their corpus, in
    which a third of all pairs are filter pairs."""
    relevance, filtered = random_relevance(rng, rows, labels), random_relevance(rng, rows, labels)
    whole = corpus_of(relevance)
    test = Split(whole.train.texts, relevance, filtered)
    lengths = rng.integers(0, k + 1, size=rows) if fewer else np.full(rows, k)
    predicted = [rng.permutation(labels)[:length] for length in lengths]
    ids = test.texts["uid"].take(rng.permutation(rows)).combine_chunks().cast(pa.large_string())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate(predicted).astype(np.int32)
    files = PredictedRows(ids, flat, offsets, np.zeros(rows, int), ["a"], k, None, None)
    return files, Corpus(whole.train, test, whole.labels)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), k=st.integers(1, 9), fewer=st.booleans())
def test_blocks_of_rows_are_a_plain_loop_over_them(seed: int, rows: int, k: int, fewer: bool) -> None:
    files, corpus = written(np.random.default_rng(seed), rows, 9, k, fewer)
    filtered = corpus.test.filtered.toarray() > 0
    left: dict[int, list[int]] = {}
    expected = 5
    for place, uid in enumerate(files.ids.to_pylist()):
        row, labels = int(uid.removeprefix("x")), files.labels[files.offsets[place] : files.offsets[place + 1]]
        left[row] = [label for label in labels.tolist() if not filtered[row, label]]
        if len(labels) == k:
            expected = min(expected, len(left[row]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "BLOCK_ROWS", 5)
        patch.setattr(predictions, "DEPTH", 5)
        predicted, depth = by_row(files, corpus)
    assert depth == predicted.shape[1] == expected
    assert predicted.tolist() == [(left[row] + [-1] * expected)[:expected] for row in range(rows)]


def test_they_take_little_more_memory_than_what_is_measured() -> None:
    files, corpus = written(np.random.default_rng(0), 20_000, 160, 151, fewer=False)
    tracemalloc.start()
    predicted, _ = by_row(files, corpus)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * predicted.nbytes


def test_what_does_not_fit_the_rows_is_refused(memory: raexmc_ray.Memory, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no predictions under"):
        evaluate_predictions(Folder.at(tmp_path), corpus, SECTION)
    paths = write(memory, corpus, tmp_path, 12)
    whole = pq.read_table(paths[0])

    def refused(table: pa.Table, said: str) -> None:
        pq.write_table(table, paths[0])
        with pytest.raises(ValueError, match=said):
            evaluate_predictions(Folder.at(tmp_path), corpus, SECTION)

    uid = whole["id"][0].as_py()
    refused(whole.slice(1), f"1 test rows have no prediction, '{uid}' among them")
    refused(pa.concat_tables([whole, whole.slice(0, 1)]), rf"id '{uid}' is there 2 times, in .*part-0\.parquet: name")
    ids = pa.array(["elsewhere", *whole["id"].to_pylist()[1:]])
    refused(whole.set_column(0, "id", ids), r"part-0\.parquet: id 'elsewhere' is no uid of the corpus's test part")
    far = pa.array([[10**6], *whole["labels"].to_pylist()[1:]], pa.list_(pa.int64()))
    refused(whole.set_column(1, "labels", far), rf"part-0\.parquet, id '{uid}': label 1000000 is none of the corpus's")
    twice = pa.array([[3, 5, 3], *whole["labels"].to_pylist()[1:]], pa.list_(pa.int64()))
    refused(whole.set_column(1, "labels", twice), rf"part-0\.parquet, id '{uid}': a label is there twice")
    refused(whole.drop_columns(["labels"]), r"part-0\.parquet: is no file of predictions")
    refused(whole.set_column(1, "labels", pa.array([["a"]] * len(whole))), r"part-0\.parquet: column 'labels' must be")
    other = {"snapshot": "another", "settings": json.dumps({"k": 12})}
    refused(whole.replace_schema_metadata(other), r"predictions of several runs")
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"part-0\.parquet: is no file of predictions, or torn"):
        evaluate_predictions(Folder.at(tmp_path), corpus, SECTION)


def test_lines_of_a_raw_text_corpus_that_were_scored_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, texts in (("trn_X", "one\ntwo\n"), ("tst_X", "three\nfour\nfive\n"), ("Y", "a label\n")):
        (tmp_path / f"raw/{name}.txt").write_text(texts)
    for name, rows in (("trn", 2), ("tst", 3)):
        sp.save_npz(tmp_path / f"Y.{name}.npz", sp.csr_matrix(np.ones((rows, 1), np.float32)))
    (file,) = find_inputs([str(tmp_path / "raw/tst_X.txt")])
    (unit,) = cut_file(file, Columns()).table(0, np.arange(1)).to_pylist()
    ids = UnitReader([file], Columns()).read(Unit(**unit)).ids  # with which they are scored
    found = pa.table({"id": ids, "labels": pa.array([[0]] * 3, pa.list_(pa.int64()))})
    pq.write_table(found, tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"id '3' is no uid .* from 1 .* from 0 .*: score the test part as JSON lines"):
        evaluate_predictions(Folder.at(tmp_path), read_corpus(tmp_path), SECTION)
