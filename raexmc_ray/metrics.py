"""P@k, nDCG@k, PSP@k, PSnDCG@k and R@k as pyxclib computes them, and which labels they come from.

Binary relevance. Rows without labels are excluded from every mean. A row with fewer than k predictions is padded
with wrong ones. No array is as long as rows × labels: predictions are looked up in the sorted pairs (row, label).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

PRECISION_AT, RECALL_AT = (1, 3, 5), (10, 100)
BEST = "best "
"""Before the name of a propensity-scored figure: what the best possible ranking of the row would have."""
BLOCK_ROWS = 65536
"""Rows looked up at once: a few hundred megabytes at a hundred predictions each."""


def inverse_propensity(relevance: sp.csr_matrix, a: float, b: float) -> np.ndarray:
    """float64 [L]: 1 + C (n_l + B)^−A with C = (ln N − 1)(B + 1)^A, n_l the training instances of label l.

    relevance: CSR [N, L] of the training part. Jain, Prabhu, Varma: Extreme Multi-label Loss Functions for
    Recommendation, Tagging, Ranking & Other Missing Label Applications, KDD 2016. A label that no training instance
    has weighs most: 1 + C·B^−A. Of one row or two, every label weighs 1. Raises ValueError where a weight is infinite.
    """
    rows, labels = relevance.shape
    counts = np.bincount(relevance.indices, minlength=labels)
    if b == 0 and not counts.all():
        raise ValueError(
            "corpus.propensity_b is 0, and a label without a training instance would weigh infinitely much: raise it"
        )
    c = max(0.0, np.log(max(1, rows)) - 1) * (b + 1) ** a  # below three rows propensities would be above 1
    return 1 + c * (counts + b) ** -a


@dataclass(frozen=True)
class Judged:
    """Predictions beside what is relevant, of the rows that have a label.

    rows: int64 [R], their places. predicted_Rk: int64, −1 for none. hits_Rk: bool, whether each is relevant.
    relevance: CSR [R, L]. counts_R: int64, labels of each row.
    """

    rows: np.ndarray
    predicted_Rk: np.ndarray
    hits_Rk: np.ndarray
    relevance: sp.csr_matrix
    counts_R: np.ndarray


def judge(predicted_Bk: np.ndarray, relevance: sp.csr_matrix, depth: int) -> Judged:
    """Look up the first `depth` predictions of each row.

    predicted_Bk: int64, the predicted labels of each row, the best first, distinct; −1 for none.
    relevance: CSR [B, L]. Raises ValueError where no row has a label, or fewer labels were predicted than `depth`.
    """
    if predicted_Bk.shape[1] < depth:
        raise ValueError(f"metrics to {depth} labels need as many predictions; found {predicted_Bk.shape[1]}")
    counts_B = np.diff(relevance.indptr)
    rows = np.flatnonzero(counts_B)
    if not len(rows):
        raise ValueError("no row has a label: there is nothing to measure")
    relevance, predicted_Rk = relevance[rows], predicted_Bk[rows, :depth]
    hits = [
        look_up(predicted_Rk[start : start + BLOCK_ROWS], relevance[start : start + BLOCK_ROWS])
        for start in range(0, len(rows), BLOCK_ROWS)
    ]
    return Judged(rows, predicted_Rk, np.concatenate(hits), relevance, counts_B[rows])


def row_figures(
    judged: Judged,
    inverse_propensity_L: np.ndarray,
    precision_at: Sequence[int] = PRECISION_AT,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, np.ndarray]:
    """{name: float64 [R]}, from which every metric is a mean or a ratio of means (`metrics_of`).

    "P@1", "nDCG@1", "PSP@1", "PSnDCG@1", "R@10" …: what each row adds; beside a propensity-scored one stands what the
    best possible ranking of the row would have added: "best PSP@1". inverse_propensity_L: float64, of the training
    part.
    """
    deepest = max(precision_at, default=0)
    hits_Rk, counts_R = judged.hits_Rk, judged.counts_R
    looked_at = judged.predicted_Rk[:, :deepest]
    gains_Rk = np.where(hits_Rk[:, :deepest], inverse_propensity_L[np.maximum(looked_at, 0)], 0.0)
    ideal_Rk = _best_weights(judged.relevance, inverse_propensity_L, deepest)
    discounts = 1 / np.log2(np.arange(2, deepest + 2))
    ideal_dcg = np.concatenate([[0], np.cumsum(discounts)])
    figures = {}
    for k in precision_at:
        figures[f"P@{k}"] = hits_Rk[:, :k].sum(1) / k
    for k in precision_at:
        figures[f"nDCG@{k}"] = hits_Rk[:, :k] @ discounts[:k] / ideal_dcg[np.minimum(k, counts_R)]
    for k in precision_at:
        figures[f"PSP@{k}"], figures[f"best PSP@{k}"] = gains_Rk[:, :k].sum(1), ideal_Rk[:, :k].sum(1)
    for k in precision_at:
        full = ideal_dcg[np.minimum(k, counts_R)]
        gained, best = (weights_Rk[:, :k] @ discounts[:k] / full for weights_Rk in (gains_Rk, ideal_Rk))
        figures[f"PSnDCG@{k}"], figures[f"best PSnDCG@{k}"] = gained, best
    for k in recall_at:
        figures[f"R@{k}"] = hits_Rk[:, :k].sum(1) / counts_R
    return figures


def metrics_of(figures: Mapping[str, np.ndarray]) -> dict[str, float]:
    """{metric: percent} over all rows of `row_figures`: a mean, or where the best possible stands beside it, the ratio
    of the two means."""
    table = {}
    for name, figure_R in figures.items():
        if not name.startswith(BEST):
            over = figures.get(f"{BEST}{name}")
            table[name] = 100 * float(figure_R.mean() if over is None else figure_R.sum() / over.sum())
    return table


def score_table(
    predicted_Bk: np.ndarray,
    relevance: sp.csr_matrix,
    inverse_propensity_L: np.ndarray,
    precision_at: Sequence[int] = PRECISION_AT,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """{"P@1": …, "nDCG@1": …, "PSP@1": …, "PSnDCG@1": …, "R@10": …} in percent.

    predicted_Bk, relevance: as `judge` takes them, and its errors. inverse_propensity_L: float64, of the training part.
    """
    judged = judge(predicted_Bk, relevance, max(*precision_at, *recall_at))
    return metrics_of(row_figures(judged, inverse_propensity_L, precision_at, recall_at))


def coverage(judged: Judged, k: int) -> dict[str, float]:
    """Which labels the first k predictions of all rows reach, in percent: {"predicted": of all labels, those that
    were predicted at least once; "found": of the labels that are relevant somewhere, those that were right once}."""
    predicted, hits = judged.predicted_Rk[:, :k], judged.hits_Rk[:, :k]
    labels = judged.relevance.shape[1]

    def different(some: np.ndarray) -> int:
        seen_L = np.zeros(labels, bool)
        seen_L[some] = True
        return int(seen_L.sum())

    return {
        "predicted": 100 * different(predicted[predicted >= 0]) / labels,
        "found": 100 * different(predicted[hits]) / different(judged.relevance.indices),
    }


def frequency_groups(counts_L: np.ndarray, groups: int) -> np.ndarray:
    """int64 [L]: the group of each label by its number of training instances, 0 the most frequent; each group has an
    equal share of the training pairs, as far as whole labels allow. Three of them are head, torso and tail.

    counts_L: int64. Labels of equal frequency stand in the order of their ids; those without a training instance are
    in the last group.
    """
    order = np.argsort(-counts_L, kind="stable")
    before = np.cumsum(counts_L[order]) - counts_L[order]
    group_L = np.empty(len(counts_L), np.int64)
    group_L[order] = np.minimum(groups * before // max(1, int(counts_L.sum())), groups - 1)
    group_L[counts_L == 0] = groups - 1
    return group_L


def by_group(judged: Judged, group_L: np.ndarray, k: int) -> list[dict[str, float]]:
    """For each group of labels {"labels": number, "P": its part of P@k, "R": its pairs found among the first k},
    the last two in percent. The parts add up to P@k of all labels.

    group_L: int64 [L], groups 0, 1, 2 …
    """
    groups = int(group_L.max()) + 1
    hits = judged.hits_Rk[:, :k]
    found = np.bincount(group_L[judged.predicted_Rk[:, :k][hits]], minlength=groups)
    pairs = np.bincount(group_L[judged.relevance.indices], minlength=groups)
    labels = np.bincount(group_L, minlength=groups)
    return [
        {"labels": float(n), "P": 100 * f / (k * len(hits)), "R": 100 * f / max(1, p)}
        for n, f, p in zip(labels.tolist(), found.tolist(), pairs.tolist(), strict=True)
    ]


def look_up(predicted_Bk: np.ndarray, relevance: sp.csr_matrix) -> np.ndarray:
    """bool [B, k]: whether each prediction, −1 for none, is relevant: CSR [B, L], which SciPy samples."""
    B, k = predicted_Bk.shape
    given = np.flatnonzero(predicted_Bk.ravel() >= 0)
    hits = np.zeros(B * k, bool)
    if len(given):
        hits[given] = np.asarray(relevance[given // k, predicted_Bk.ravel()[given]]).ravel() != 0
    return hits.reshape(B, k)


def _best_weights(relevance: sp.csr_matrix, weights_L: np.ndarray, k: int) -> np.ndarray:
    """float64 [B, k]: the k largest weights among each row's labels, descending, 0 where it has fewer."""
    B, L = relevance.shape
    heaviest = np.argsort(-weights_L, kind="stable")
    place_L = np.empty(L, np.int64)
    place_L[heaviest] = np.arange(L)
    counts = np.diff(relevance.indptr)
    row = np.repeat(np.arange(B), counts)
    codes = np.sort(row * L + place_L[relevance.indices])  # row by row, the heaviest first
    rank = np.arange(len(row)) - np.repeat(relevance.indptr[:-1], counts)
    best = np.zeros((B, k))
    top = rank < k
    best[row[top], rank[top]] = weights_L[heaviest[codes[top] % L]]
    return best
