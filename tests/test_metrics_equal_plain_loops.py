"""The metrics, over random predictions, are METHOD.md's definitions in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import random_relevance
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.metrics import inverse_propensity, score_table


def naive(predicted: np.ndarray, y: np.ndarray, weights: np.ndarray, precision_at: tuple, recall_at: tuple) -> dict:
    rows = [i for i in range(len(y)) if y[i].any()]
    table = {}
    for k in sorted({*precision_at, *recall_at}):
        precision, recall, ndcg, gained, best = [], [], [], 0.0, 0.0
        for i in rows:
            hit = [label >= 0 and bool(y[i, label]) for label in predicted[i, :k]]
            precision.append(sum(hit) / k)
            recall.append(sum(hit) / y[i].sum())
            gain = sum(h / np.log2(rank + 2) for rank, h in enumerate(hit))
            ndcg.append(gain / sum(1 / np.log2(rank + 2) for rank in range(min(k, y[i].sum()))))
            gained += sum(weights[label] for label, h in zip(predicted[i, :k], hit, strict=True) if h)
            best += sum(sorted(weights[y[i]], reverse=True)[:k])
        if k in precision_at:
            table |= {f"P@{k}": np.mean(precision), f"nDCG@{k}": np.mean(ndcg), f"PSP@{k}": gained / best}
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
