"""The report: one page that needs nothing else, says what was measured, escapes what it is given, and holds for little
data. What it says of sources and probabilities is what plain loops say."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import json_lines, tiny_encoder
from playwright.sync_api import sync_playwright

import raexmc_ray
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.evaluation import Measured, evaluate, load
from raexmc_ray.files import Folder
from raexmc_ray.memory.hits import Hits
from raexmc_ray.memory.write import build_memory
from raexmc_ray.predict import Predictions
from raexmc_ray.recipe import CorpusSection, Neighbours, PredictionSection
from raexmc_ray.report import Study, write_report
from raexmc_ray.report.calibration import calibrate, probability
from raexmc_ray.report.findings import Findings
from raexmc_ray.report.sources import SourceCounts

SECTION = CorpusSection(path="anywhere")
HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)> \"quoted\""


def report(corpus: Corpus, folder: Path, settings: PredictionSection) -> tuple[Measured, Findings, str]:
    """Build a memory, evaluate it and write its report; any warning is an error."""
    build_memory(corpus, tiny_encoder(), folder / "memory", defaults=settings)
    memory = raexmc_ray.open(folder / "memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = Study(memory, corpus, SECTION, settings)
        measured = evaluate(memory, corpus, SECTION, settings, observer=study)
        findings = study.findings()
        page = write_report(measured, findings, Folder.at(folder / "report"))
    return measured, findings, page.read().decode()


@pytest.fixture(scope="module")
def written(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Findings, str, Path]:
    folder = tmp_path_factory.mktemp("report")
    settings = PredictionSection(temperature=0.08, neighbours=Neighbours(joint=60))
    return *report(read_corpus(tiny_corpus), folder, settings), folder / "report"


def test_it_needs_nothing_from_outside_and_no_script(written: tuple[Measured, Findings, str, Path]) -> None:
    *_, page, folder = written
    assert not re.findall(r"(?:src|href|srcset)=[\"'](?!data:)", page)
    assert "url(" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {
        name + theme
        for name in (
            "trade-off", "lambda", "temperature", "neighbours", "ranks", "worth", "frequency", "gain", "reliability"
        )
        for theme in ("", "-dark")
    }  # fmt: skip


def test_the_figures_stand_in_it_and_beside_it(written: tuple[Measured, Findings, str, Path]) -> None:
    measured, findings, page, folder = written
    for figures in measured.table.values():
        for name in ("P@1", "nDCG@5", "PSP@3", "R@100"):
            assert f"<td>{figures[name]:.2f}</td>" in page
    assert load(Folder.at(folder) / "evaluation.json").table == measured.table
    assert Findings.model_validate_json((folder / "findings.json").read_text()) == findings
    assert set(measured.evaluation.seconds) == {"encode", "search", "aggregate", "report", "metrics"}


def test_the_curves_pass_through_the_table(written: tuple[Measured, Findings, str, Path]) -> None:
    measured, findings, *_ = written
    both = measured.table["both"]
    for curve in (findings.lambdas, findings.temperatures, findings.neighbours):
        (point,) = [point for point in curve if point.settings == findings.settings]
        assert point.figures == pytest.approx({name: both[name] for name in point.figures})
    assert [point.settings.lambda_ for point in findings.lambdas] == [round(0.05 * i, 2) for i in range(21)]
    assert findings.neighbours[-1].settings.neighbours.joint == findings.depth == 120


def test_the_mistakes_are_the_most_confident_ones(
    written: tuple[Measured, Findings, str, Path], tiny_corpus: Path
) -> None:
    measured, findings, page, _ = written
    corpus = read_corpus(tiny_corpus)
    wrong = (measured.figures["both/P@1"] == 0).sum()
    assert len(findings.mistakes) == min(20, wrong)
    scores = [one.score for one in findings.mistakes]
    assert scores == sorted(scores, reverse=True)
    for one in findings.mistakes:
        right = corpus.test.relevance[one.row].indices
        assert one.right_labels == [corpus.labels["text"][int(label)].as_py() for label in right]
        assert one.label_text not in one.right_labels
        assert one.evidence
        assert [key.share for key in one.evidence] == sorted((key.share for key in one.evidence), reverse=True)
    assert page.count("<article>") == len(findings.mistakes)


def test_it_can_be_read_on_a_phone_and_a_desktop(written: tuple[Measured, Findings, str, Path]) -> None:
    """In Chromium, without JavaScript: nothing is wider than the screen, and every figure is drawn."""
    *_, folder = written
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for width, scheme in ((390, "light"), (1280, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            page = context.new_page()
            asked = []
            page.on("request", lambda request: asked.append(request.url))  # noqa: B023
            page.goto(f"file://{folder}/index.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sizes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth])")
            assert len(sizes) == 9
            assert all(natural > 900 and 0 < shown <= width for natural, shown in sizes)
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            context.close()
        browser.close()


def corpus_in(folder: Path, train: list[list[int]], test: list[list[int]], labels: int, text: str = HOSTILE) -> Corpus:
    folder.mkdir()
    for name, rows in (("trn.json", train), ("tst.json", test)):
        lines = [{"uid": f"{name}{i}", "title": f"{text} {i}", "target_ind": row} for i, row in enumerate(rows)]
        (folder / name).write_bytes(json_lines(lines))
    (folder / "lbl.json").write_bytes(json_lines([{"uid": str(i), "title": f"{text} {i}"} for i in range(labels)]))
    return read_corpus(folder)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([[0, 2], [], [1], [0, 1, 2]], [[0, 2], []]),
        ([[0], [0], [0], [0]], [[1], [2]]),  # no label that is right is ever seen
        ([[0], [1], [2], [0]], [[0], [1], [2]] * 8),
    ],
)
@pytest.mark.parametrize("neighbours", [Neighbours(joint=3), Neighbours(instances=0, labels=2)])
def test_little_data_and_hostile_text(
    tmp_path: Path, train: list[list[int]], test: list[list[int]], neighbours: Neighbours
) -> None:
    corpus = corpus_in(tmp_path / "corpus", train, test, 3)
    _, findings, page = report(corpus, tmp_path, PredictionSection(neighbours=neighbours))
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page
    assert "nan" not in page.replace("data:image", "").split("<h1>")[1].split("<picture>")[0].lower()
    assert "NaN" not in findings.model_dump_json()
    json.loads(findings.model_dump_json())
    if findings.mistakes:
        assert "&lt;script&gt;" in page


def test_texts_and_labels_of_any_length_are_cut(tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path / "corpus", [[0], [1], [2]], [[0], [1], [2]], 3, text="word " * 5000)
    _, findings, page = report(corpus, tmp_path, PredictionSection())
    assert findings.mistakes
    assert "word " * 50 in page
    assert "word " * 60 not in page


def test_sources_are_counted_as_by_hand() -> None:
    """Two rows: keys 0, 1 are instances, 10 + l is label l's own key; −1 is padding."""
    hits = Hits(
        key_ids_Bb=np.array([[0, 12, 11], [1, 10, -1]]),
        scores_Bb=np.array([[0.9, 0.9, 0.9], [0.9, 0.9, -np.inf]], np.float32),
        is_label_Bb=np.array([[False, True, True], [False, True, False]]),
        votes=np.array([0, 2, 2, 1, 1, 0], np.int32),
        vote_offsets=np.array([0, 2, 3, 4, 5, 6, 6]),
        snapshot="s",
    )
    relevance = sp.csr_matrix(np.array([[0, 0, 1, 1], [0, 1, 0, 0]], np.float32))
    exclude = sp.csr_matrix(np.array([[0, 1, 0, 0], [0, 0, 0, 0]], np.float32))
    settings = PredictionSection(lambda_=0.5, temperature=0.1, neighbours=Neighbours(joint=3))
    predictions = Predictions(np.array([[2, 0], [0, 1]]), np.array([[0.3, 0.2], [0.3, 0.2]], np.float32))
    counts = SourceCounts(3)
    counts.add(hits, predictions, relevance, exclude, settings)
    found = counts.sources()
    assert (found.instances.keys, found.labels.keys) == (2 / 5, 3 / 5)
    assert found.instances.mass == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.labels.mass == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.instances.right == 1, "both vote for a right label, one of them for a wrong one, too"
    assert found.labels.right == 1 / 2, "label 1's key votes for a filter pair of the first row, and is left out"
    assert found.instances.share_by_rank == [1, 0, 0]
    reach = found.reach
    assert (reach.both, reach.instances_only, reach.labels_only, reach.neither) == (1 / 3, 1 / 3, 0, 1 / 3)
    assert found.label_share_right == pytest.approx((1 / 2 + 0) / 2)
    assert found.label_share_wrong == pytest.approx((0 + 1) / 2)


def test_a_filter_pair_that_is_relevant_too_is_not_judged() -> None:
    """Label 0 is right for its row, and its filter pair; label 1 is right alone. Their own keys are retrieved."""
    hits = Hits(
        key_ids_Bb=np.array([[10, 11]]),
        scores_Bb=np.array([[0.9, 0.8]], np.float32),
        is_label_Bb=np.array([[True, True]]),
        votes=np.array([0, 1], np.int32),
        vote_offsets=np.array([0, 1, 2]),
        snapshot="s",
    )
    relevance, exclude = (sp.csr_matrix(np.array([row], np.float32)) for row in ([1, 1], [1, 0]))
    counts = SourceCounts(2)
    predictions = Predictions(np.array([[1]]), np.array([[0.5]], np.float32))
    counts.add(hits, predictions, relevance, exclude, PredictionSection(neighbours=Neighbours(joint=2)))
    assert counts.sources().labels.right == 1, "of one key that is judged, not of two"


def test_probabilities_are_what_happens() -> None:
    """Scores whose true probabilities are known: the two numbers are found, and the error measured goes away."""
    rng = np.random.default_rng(0)
    scores = rng.beta(0.5, 4, size=(6000, 5)).astype(np.float32)
    truth = probability(scores, 0.7, 1.1)
    right = rng.random(scores.shape) < truth
    counts = right.sum(1) + 1
    found = calibrate(scores, right, counts)
    assert found is not None
    assert found.temperature == pytest.approx(0.7, abs=0.05)
    assert found.shift == pytest.approx(1.1, abs=0.1)
    assert found.probabilities.error < 0.02 < found.scores.error
    assert found.probabilities.log_loss < found.scores.log_loss
    assert found.probabilities.brier < found.scores.brier
    for one in found.thresholds:
        assert probability(np.array([one.score]), found.temperature, found.shift)[0] == pytest.approx(one.probability)
    recalls = [one.recall for one in found.thresholds]
    assert recalls == sorted(recalls, reverse=True)
    assert (np.diff(probability(np.linspace(0, 1, 50), found.temperature, found.shift)) >= 0).all(), "the order stays"


def test_a_threshold_counts_as_a_plain_loop_does() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((40, 3)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = 0
    right = (rng.random(scores.shape) < 0.5) & (scores > 0)
    counts = right.sum(1) + rng.integers(0, 2, size=40)
    found = calibrate(scores, right, counts)
    assert found is not None
    measured = np.random.default_rng(0).permutation(40)[1::2]
    for one in found.thresholds:
        given = [
            (row, place)
            for row in measured
            for place in range(3)
            if scores[row, place] > 0
            and probability(scores[row, place : place + 1], found.temperature, found.shift)[0] >= one.probability
        ]
        hits = sum(right[cell] for cell in given)
        assert one.precision == (pytest.approx(hits / len(given)) if given else None)
        assert one.recall == pytest.approx(hits / counts[measured].sum())
        assert one.rows == pytest.approx(len({row for row, _ in given}) / len(measured))


@pytest.mark.parametrize("outcome", [False, True])
def test_what_is_always_right_or_always_wrong_has_finite_probabilities(outcome: bool) -> None:
    scores = np.full((30, 2), 0.2, np.float32)
    found = calibrate(scores, np.full(scores.shape, outcome), np.full(30, 2))
    assert found is not None
    assert np.isfinite([found.temperature, found.shift, found.probabilities.error]).all()
    assert found.probabilities.error < 0.1
    assert calibrate(scores[:4], np.full((4, 2), outcome), np.full(4, 2)) is None
    assert calibrate(np.zeros((30, 2), np.float32), np.zeros((30, 2), bool), np.full(30, 2)) is None
