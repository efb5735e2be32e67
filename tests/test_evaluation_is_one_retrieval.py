"""An evaluation says what three retrievals of their own would say, in one shape, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_encoder

import raexmc_ray
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.evaluation import Evaluation, Measured, evaluate, format_table, load
from raexmc_ray.evaluation.measure import DEPTH, popular
from raexmc_ray.evaluation.retrieve import CUTTING_KINDS
from raexmc_ray.files import Folder
from raexmc_ray.local import Memory
from raexmc_ray.memory.write import build_memory
from raexmc_ray.metrics import inverse_propensity, metrics_of, score_table
from raexmc_ray.predict import aggregate
from raexmc_ray.recipe import CorpusSection, MemorySection, Neighbours, PredictionSection, Recipe

SETTINGS = PredictionSection(lambda_=0.4, temperature=0.08, neighbours=Neighbours(joint=60))
SECTION = CorpusSection(path="anywhere")


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    return read_corpus(tiny_corpus)


@pytest.fixture(scope="module")
def memory(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    folder = tmp_path_factory.mktemp("memory")
    build_memory(corpus, tiny_encoder(), folder, MemorySection(shards=2), SETTINGS)
    return raexmc_ray.open(folder)


@pytest.fixture(scope="module")
def measured(memory: Memory, corpus: Corpus) -> Measured:
    return evaluate(memory, corpus, SECTION, SETTINGS)


def test_a_memory_of_another_corpus_is_refused(memory: Memory, corpus: Corpus) -> None:
    """Rows held out of the corpus are in this memory, and would find themselves."""
    with pytest.raises(ValueError, match=f"snapshot {memory.manifest.id} is not of this corpus"):
        evaluate(memory, corpus.hold_out(0.2), SECTION, SETTINGS)
    reordered = Corpus(corpus.train, corpus.test, corpus.labels.take(np.arange(len(corpus.labels))[::-1]))
    with pytest.raises(ValueError, match="is not of this corpus"):
        evaluate(memory, reordered, SECTION, SETTINGS)


def test_the_recipe_that_is_recorded_is_the_memorys(
    memory: Memory, corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that of the run, which may have been changed since the memory was built."""
    built = Recipe.parse({"corpus": {"path": "there"}}, ["training.epochs=3", "memory.shards=2"])
    run = Recipe.parse({"corpus": {"path": "here"}}, ["training.epochs=9", "memory.shards=2", "encoder.layers=2"])
    manifest = memory.manifest.model_copy(update={"recipe": built.record()})
    of_built = Memory(replace(memory.snapshot, manifest=manifest), memory.shards)
    recorded = evaluate(of_built, corpus, SECTION, SETTINGS, recipe=run).evaluation.recipe
    made = {name: built.record()[name] for name in ("encoder", "training", "memory")}
    around = {"corpus": run.record()["corpus"], "cluster": run.record()["cluster"]}
    around["prediction"] = SETTINGS.model_dump(mode="json", by_alias=True)
    assert recorded == made | around
    assert "built from a recipe that differs in encoder.layers, training.epochs:" in caplog.text
    caplog.clear()
    assert evaluate(memory, corpus, SECTION, SETTINGS, recipe=run).evaluation.recipe == around, "it does not say"
    assert not caplog.text


def searched_apart(memory: Memory, corpus: Corpus, settings: PredictionSection) -> dict[str, dict[str, float]]:
    """The table from a retrieval for each of its rows."""
    queries = memory.encoder.encode(corpus.test.texts["text"].to_pylist())
    inverse = inverse_propensity(corpus.train.relevance, SECTION.propensity_a, SECTION.propensity_b)
    table = {}
    for name, lambda_, neighbours in (
        ("labels only", 0.0, Neighbours(instances=0, labels=DEPTH)),
        ("instances only", 1.0, Neighbours(instances=DEPTH, labels=0)),
        ("both", settings.lambda_, settings.neighbours),
    ):
        hits = memory.search(queries, neighbours)
        found = aggregate(
            hits, lambda_=lambda_, temperature=settings.temperature, k=DEPTH, exclude=corpus.test.filtered
        )
        table[name] = score_table(found.labels_Bk, corpus.test.relevance, inverse)
    return table


@pytest.mark.parametrize("neighbours", [Neighbours(joint=60), Neighbours(instances=30, labels=20)])
def test_the_table_is_that_of_retrievals_apart(memory: Memory, corpus: Corpus, neighbours: Neighbours) -> None:
    settings = SETTINGS.model_copy(update={"neighbours": neighbours})
    table = evaluate(memory, corpus, SECTION, settings).table
    expected = searched_apart(memory, corpus, settings)
    assert list(table) == ["popularity", *expected]
    for row, figures in expected.items():
        assert table[row] == pytest.approx(figures)


def test_labels_only_are_ranked_by_similarity_at_any_temperature(
    memory: Memory, corpus: Corpus, measured: Measured
) -> None:
    """At a low one the weights of all but the nearest are below what a float32 can say."""
    for temperature in (0.001, 0.004, 10.0):
        table = evaluate(memory, corpus, SECTION, SETTINGS.model_copy(update={"temperature": temperature})).table
        assert table["labels only"] == measured.table["labels only"]


def test_so_it_is_where_a_deeper_search_finds_other_keys(corpus: Corpus, tmp_path: Path) -> None:
    build_memory(corpus, tiny_encoder(), tmp_path, MemorySection(shards=1, index="ivf-pq"), SETTINGS)
    memory = raexmc_ray.open(tmp_path)
    assert memory.manifest.index.kind not in CUTTING_KINDS
    table = evaluate(memory, corpus, SECTION, SETTINGS).table
    for row, figures in searched_apart(memory, corpus, SETTINGS).items():
        assert table[row] == pytest.approx(figures)


def test_a_corpus_without_a_test_part_is_refused(memory: Memory, corpus: Corpus) -> None:
    for rows in (np.arange(0), np.flatnonzero(corpus.test.labels_per_row == 0)):
        without = Corpus(corpus.train, corpus.test.take(rows), corpus.labels)
        with pytest.raises(ValueError, match=r"no test row with a label.*corpus\.holdout"):
            evaluate(memory, without, SECTION, SETTINGS)


def test_the_rows_add_up_to_the_table(measured: Measured, corpus: Corpus) -> None:
    assert measured.evaluation.evaluated + measured.evaluation.excluded == len(corpus.test)
    assert len(measured.rows) == measured.evaluation.evaluated
    for row, figures in measured.table.items():
        columns = {name: measured.figures[f"{row}/{name}"] for name in figures}
        columns |= {
            f"best {name}": measured.figures[f"best/{name}"] for name in figures if f"best/{name}" in measured.figures
        }
        assert metrics_of(columns) == pytest.approx(figures)


def test_the_breakdown_adds_up_to_what_is_found(measured: Measured, corpus: Corpus) -> None:
    breakdown = measured.evaluation.breakdown
    hits = (measured.figures["both/R@10"] * corpus.test.labels_per_row[measured.rows]).sum()
    for groups in (breakdown.thirds, breakdown.tenths):
        assert sum(group.labels for group in groups) == len(corpus.labels)
        assert sum(group.pairs for group in groups) == corpus.test.relevance.nnz
        assert sum(group.precision["both"] for group in groups) == pytest.approx(10 * hits / len(measured.rows))
        assert sum(g.recall["both"] * g.pairs for g in groups if g.recall) == pytest.approx(100 * hits)
        assert [group.most for group in groups] == sorted((group.most for group in groups), reverse=True)


def test_what_is_saved_is_read_back_and_nothing_else_stays(measured: Measured, tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    measured.save(folder)
    again = load(folder / "evaluation.json")
    assert again.table == measured.table
    assert np.array_equal(again.rows, measured.rows)
    assert set(again.figures) == set(measured.figures)
    for name, values in measured.figures.items():
        assert np.array_equal(again.figures[name], values)
    other = Measured(
        measured.evaluation, measured.rows, {**measured.figures, "both/P@1": 1 - again.figures["both/P@1"]}
    )
    other.save(folder)
    assert len(list(tmp_path.iterdir())) == 2, "the rows of the evaluation before are gone"
    assert np.array_equal(load(folder / "evaluation.json").figures["both/P@1"], other.figures["both/P@1"])
    other.save(folder)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_copy_of_the_json_keeps_its_rows(measured: Measured, tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    measured.save(folder)
    (folder / "before.json").write((folder / "evaluation.json").read())
    for changed in (1, 2):
        Measured(measured.evaluation, measured.rows, {"both/P@1": changed * measured.figures["both/P@1"]}).save(folder)
    assert np.array_equal(load(folder / "before.json").figures["both/P@1"], measured.figures["both/P@1"])
    assert len(list(tmp_path.iterdir())) == 4, "the rows in between are gone"


def test_what_is_torn_foreign_or_too_new_is_refused_by_name(measured: Measured, tmp_path: Path) -> None:
    file = Folder.at(tmp_path) / "evaluation.json"
    with pytest.raises(FileNotFoundError, match="raexmc evaluate"):
        load(file)
    written = measured.save(Folder.at(tmp_path))
    content = json.loads(file.read())
    assert written.rows
    rows = tmp_path / written.rows.name
    for change, said in (
        ({"format_version": 99}, "format version 99"),
        ({"rows": None}, "names no file of rows"),
        ({"surprise": 1}, "surprise"),
    ):
        file.write(json.dumps({**content, **change}).encode())
        with pytest.raises(ValueError, match=rf"evaluation\.json.*{said}"):
            load(file)
    file.write(json.dumps({"both": {"P@1": 1.0}}).encode())
    with pytest.raises(ValueError, match=r"evaluation\.json: is no evaluation"):
        load(file)
    file.write(json.dumps(content).encode())
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{rows.name}: is torn"):
        load(file)
    rows.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{rows.name}: is missing"):
        load(file)


def test_popularity_drops_filter_pairs(corpus: Corpus) -> None:
    counts = np.bincount(corpus.train.relevance.indices, minlength=len(corpus.labels))
    first = int(np.argmax(counts))
    filtered = corpus.test.filtered.tolil()
    filtered[3, first] = 1
    test = type(corpus.test)(corpus.test.texts, corpus.test.relevance, filtered.tocsr())
    predicted = popular(Corpus(corpus.train, test, corpus.labels), 5)
    assert predicted[0, 0] == first
    assert first not in predicted[3]
    assert predicted[3, :4].tolist() == predicted[0, 1:].tolist()
    assert (popular(corpus, 3 * len(corpus.labels))[0] >= 0).sum() == len(corpus.labels), "and no label twice"


def test_a_metric_that_is_missing_is_a_dash(measured: Measured) -> None:
    assert isinstance(measured.evaluation, Evaluation)
    printed = format_table({"a": {"P@1": 1.0, "R@10": 2.0}, "b": {"P@1": 3.0}})
    assert printed.splitlines()[0].split() == ["P@1", "R@10"]
    assert printed.splitlines()[2].split() == ["b", "3.00", "–"]
