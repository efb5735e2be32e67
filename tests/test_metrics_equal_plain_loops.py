"""The metrics, over random predictions, are their definitions in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import random_relevance
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray import metrics
from raexmc_ray.metrics import by_group, coverage, frequency_groups, inverse_propensity, judge, score_table


def naive(predicted: np.ndarray, y: np.ndarray, weights: np.ndarray, precision_at: tuple, recall_at: tuple) -> dict:
    rows = [i for i in range(len(y)) if y[i].any()]
    table = {}
    for k in sorted({*precision_at, *recall_at}):
        precision, recall, ndcg, gained, best = [], [], [], 0.0, 0.0
        ps_gained, ps_best = 0.0, 0.0
        for i in rows:
            hit = [label >= 0 and bool(y[i, label]) for label in predicted[i, :k]]
            precision.append(sum(hit) / k)
            recall.append(sum(hit) / y[i].sum())
            gain = sum(h / np.log2(rank + 2) for rank, h in enumerate(hit))
            ndcg.append(gain / sum(1 / np.log2(rank + 2) for rank in range(min(k, y[i].sum()))))
            gained += sum(weights[label] for label, h in zip(predicted[i, :k], hit, strict=True) if h)
            ideal = sorted(weights[y[i]], reverse=True)[:k]
            best += sum(ideal)
            full = sum(1 / np.log2(rank + 2) for rank in range(min(k, y[i].sum())))
            won = [weights[label] * h for label, h in zip(predicted[i, :k], hit, strict=True)]
            ps_gained += sum(weight / np.log2(rank + 2) for rank, weight in enumerate(won)) / full
            ps_best += sum(weight / np.log2(rank + 2) for rank, weight in enumerate(ideal)) / full
        if k in precision_at:
            table |= {f"P@{k}": np.mean(precision), f"nDCG@{k}": np.mean(ndcg), f"PSP@{k}": gained / best}
            table[f"PSnDCG@{k}"] = ps_gained / ps_best
        if k in recall_at:
            table[f"R@{k}"] = np.mean(recall)
    return {name: 100 * value for name, value in table.items()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), labels=st.integers(8, 20), density=st.floats(0.02, 0.9))
def test_every_metric_is_its_definition(seed: int, rows: int, labels: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    relevance = random_relevance(rng, rows, labels, density)
    predicted = np.stack([rng.permutation(labels)[:8] for _ in range(rows)])
    predicted[np.arange(8) >= rng.integers(0, 9, size=(rows, 1))] = -1  # fewer predictions than k
    weights = inverse_propensity(random_relevance(rng, 50, labels), 0.55, 1.5)
    if not relevance.nnz:
        with pytest.raises(ValueError, match="no row has a label"):
            score_table(predicted, relevance, weights, (1, 3), (8,))
        return
    got = score_table(predicted, relevance, weights, (1, 3, 5), (3, 8))
    assert got == pytest.approx(naive(predicted, relevance.toarray() > 0, weights, (1, 3, 5), (3, 8)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_best_ranking_has_all_of_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = random_relevance(rng, 6, 9, 0.5).toarray()
    y[:, 0] = 1
    weights = 1 + rng.random(9)
    got = score_table(np.argsort(-(y * weights), axis=1), sp.csr_matrix(y), weights, (1, 3), (9,))
    assert [got[name] for name in ("P@1", "nDCG@3", "PSP@1", "PSP@3", "R@9")] == pytest.approx([100] * 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), k=st.integers(1, 8), groups=st.integers(1, 4))
def test_which_labels_it_comes_from(seed: int, rows: int, k: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    relevance = random_relevance(rng, rows, 15, 0.3)
    if not relevance.nnz:
        return
    predicted = np.stack([rng.permutation(15)[:8] for _ in range(rows)])
    predicted[np.arange(8) >= rng.integers(0, 9, size=(rows, 1))] = -1
    judged = judge(predicted, relevance, 8)
    y = relevance.toarray() > 0
    kept = [i for i in range(rows) if y[i].any()]
    assert judged.rows.tolist() == kept
    pairs = [(i, label) for i in kept for label in predicted[i, :k] if label >= 0]
    right = [(i, label) for i, label in pairs if y[i, label]]
    assert coverage(judged, k) == pytest.approx(
        {
            "predicted": 100 * len({label for _, label in pairs}) / 15,
            "found": 100 * len({label for _, label in right}) / y.any(0).sum(),
        }
    )
    group = rng.integers(groups, size=15)
    group[0] = groups - 1
    table = by_group(judged, group, k)
    for number, row in enumerate(table):
        found = sum(group[label] == number for _, label in right)
        assert row["labels"] == (group == number).sum()
        assert row["P"] == pytest.approx(100 * found / k / len(kept))
        assert row["R"] == pytest.approx(100 * found / max(1, y[:, group == number].sum()))
    weights = np.ones(15)
    assert sum(row["P"] for row in table) == pytest.approx(
        score_table(predicted, relevance, weights, (k,), (8,))[f"P@{k}"]
    )


def test_head_torso_and_tail_have_a_third_of_the_pairs_each() -> None:
    counts = np.array([0, 30, 10, 10, 10, 1, 9, 20, 0])
    assert frequency_groups(counts, 3).tolist() == [2, 0, 1, 2, 2, 2, 2, 1, 2]
    assert frequency_groups(np.zeros(3, np.int64), 3).tolist() == [2, 2, 2]
    many = frequency_groups(np.random.default_rng(0).zipf(1.5, 5000), 10)
    assert set(many.tolist()) <= set(range(10))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    relevance = random_relevance(rng, 50, 20, 0.1)
    predicted = np.stack([rng.permutation(20)[:10] for _ in range(50)])
    whole = score_table(predicted, relevance, np.ones(20), (1, 5), (10,))
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 7)
    assert score_table(predicted, relevance, np.ones(20), (1, 5), (10,)) == whole
