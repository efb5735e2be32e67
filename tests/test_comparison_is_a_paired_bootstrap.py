"""`raexmc compare`: the interval is that of a plain loop, holds what it says, and says nothing of nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus, Split
from raexmc_ray.corpus.types import text_table
from raexmc_ray.evaluation import Measured
from raexmc_ray.evaluation import compare as module
from raexmc_ray.evaluation.compare import compare, resampled_sums
from raexmc_ray.evaluation.measure import measure
from raexmc_ray.files import Folder
from raexmc_ray.recipe import CorpusSection

ROWS, LABELS = 150, 20


def corpus_of(seed: int, rows: int = ROWS) -> Corpus:
    rng = np.random.default_rng(seed)

    def split(name: str, number: int) -> Split:
        relevance = sp.csr_matrix((rng.random((number, LABELS)) < 0.2).astype(np.float32))
        texts = text_table([f"{name}{i}" for i in range(number)], [f"text {i}" for i in range(number)])
        return Split(texts, relevance, sp.csr_matrix(relevance.shape, dtype=np.float32))

    labels = text_table([f"z{i}" for i in range(LABELS)], [f"label {i}" for i in range(LABELS)])
    return Corpus(split("x", 100), split("t", rows), labels)


def predictions(corpus: Corpus, seed: int, skill: float) -> np.ndarray:
    """int64 [rows, labels], the better the higher the skill."""
    noise = np.random.default_rng(seed).random(corpus.test.relevance.shape)
    return np.argsort(-(noise + skill * corpus.test.relevance.toarray()), axis=1)


def measured(corpus: Corpus, seed: int, skill: float, **section: float) -> Measured:
    found = {"both": predictions(corpus, seed, skill)}
    return measure(found, corpus, CorpusSection(path="anywhere", **section), depth=LABELS)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpus_of(0)


def test_it_is_the_plain_loop(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = measured(corpus, 1, 0.3), measured(corpus, 2, 0.5)
    monkeypatch.setattr(module, "BLOCK_CELLS", 7 * ROWS)  # several blocks, the last of them short
    found = {one.metric: one for one in compare(a, b, resamples=60, seed=3)}
    rng = np.random.default_rng(3)
    drawn: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(60):
        rows = rng.integers(len(a.rows), size=len(a.rows))
        for name, differences in drawn.items():
            top = [sum(side.figures[f"both/{name}"][row] for row in rows) for side in (a, b)]
            over = sum(a.figures[f"best/{name}"][row] for row in rows) if name.startswith("PS") else len(rows)
            differences.append(100 * (top[1] - top[0]) / over)
    assert set(found) == {f"{name}@{k}" for name in ("P", "nDCG", "PSP", "PSnDCG") for k in (1, 3, 5)} | {"R@10"}
    for name, one in found.items():
        assert (one.low, one.high) == pytest.approx(tuple(np.percentile(drawn[name], [2.5, 97.5])))
        assert one.a == pytest.approx(a.table["both"][name])
        assert one.b == pytest.approx(b.table["both"][name])
        assert one.difference == pytest.approx(one.b - one.a)
        assert one.beyond_chance == (one.low > 0 or one.high < 0)


def test_the_same_twice_differs_by_nothing(corpus: Corpus) -> None:
    a = measured(corpus, 1, 0.5)
    for one in compare(a, a, resamples=100):
        assert one.difference == one.low == one.high == 0
        assert not one.beyond_chance


def test_sides_change_the_sign_and_seeds_hardly_anything(corpus: Corpus) -> None:
    a, b = measured(corpus, 1, 0.2), measured(corpus, 2, 0.6)
    there, back, again, other = compare(a, b), compare(b, a), compare(a, b), compare(a, b, seed=1)
    assert there == again
    for one, reverse, drawn_anew in zip(there, back, other, strict=True):
        assert (reverse.low, reverse.high) == pytest.approx((-one.high, -one.low))
        assert drawn_anew.low == pytest.approx(one.low, abs=0.5)
        assert one.low < one.difference < one.high
    assert next(one for one in there if one.metric == "P@1").beyond_chance


def test_the_interval_holds_the_true_difference_nineteen_times_in_twenty() -> None:
    """Many samples of rows of one large test part, whose difference is known: the intervals miss it rarely."""
    whole = corpus_of(1, 20_000)
    sides = [measured(whole, 2, 0.3), measured(whole, 3, 0.35)]
    truth = sides[1].table["both"]["P@5"] - sides[0].table["both"]["P@5"]
    columns = np.stack([side.figures["both/P@5"] for side in sides], axis=1)
    rng = np.random.default_rng(4)
    held = 0
    for trial in range(200):
        sample = columns[rng.choice(len(columns), 150, replace=False)]
        sums = resampled_sums(sample, 400, trial)
        low, high = np.percentile(100 * (sums[:, 1] - sums[:, 0]) / len(sample), [2.5, 97.5])
        held += low <= truth <= high
    assert 180 <= held <= 198


def test_what_cannot_be_compared_is_refused(corpus: Corpus) -> None:
    a = measured(corpus, 1, 0.5)
    with pytest.raises(ValueError, match="not measured on the same rows"):
        compare(a, measured(corpus_of(5), 1, 0.5))
    with pytest.raises(ValueError, match=r"not measured by the same propensities.*A=0\.55.*A=0\.6"):
        compare(a, measured(corpus, 1, 0.5, propensity_a=0.6))
    with pytest.raises(ValueError, match="A has no row 'labels only': it has both"):
        compare(a, a, "labels only")


def test_the_command(corpus: Corpus, tmp_path: Path) -> None:
    for name, skill in (("a", 0.2), ("b", 0.6)):
        measured(corpus, 1, skill).save(Folder.at(tmp_path / name), "evaluation.json")
    command = [str(Path(sys.executable).parent / "raexmc"), "compare"]
    files = [str(tmp_path / name / "evaluation.json") for name in "ab"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["P@1"]]
    assert line.rstrip().endswith("yes")
    done = subprocess.run([*command, files[0], str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no evaluation at" in done.stderr
