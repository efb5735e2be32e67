"""P@k, nDCG@k, PSP@k and R@k as pyxclib computes them (METHOD.md, Metrics). Binary relevance.

Rows without labels are excluded from every mean. A row with fewer than k predictions is padded with wrong
ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp


def inverse_propensity(relevance: sp.csr_matrix, a: float, b: float) -> np.ndarray:
    """float64 [L]: 1 + C (n_l + B)^−A with C = (ln N − 1)(B + 1)^A, n_l the training instances of label l.

    relevance: CSR [N, L] of the training part. Jain, Prabhu, Varma: Extreme Multi-label Loss Functions for
    Recommendation, Tagging, Ranking & Other Missing Label Applications, KDD 2016.
    """
    rows, labels = relevance.shape
    counts = np.bincount(relevance.indices, minlength=labels)
    c = (np.log(rows) - 1) * (b + 1) ** a
    return 1 + c * (counts + b) ** -a


def score_table(
    predicted_Bk: np.ndarray,
    relevance: sp.csr_matrix,
    inverse_propensity_L: np.ndarray,
    precision_at: Sequence[int] = (1, 3, 5),
    recall_at: Sequence[int] = (10, 100),
) -> dict[str, float]:
    """{"P@1": …, "nDCG@1": …, "PSP@1": …, "R@10": …} in percent.

    predicted_Bk: int64, the predicted labels of each row, the best first, distinct; −1 for none.
    relevance: CSR [B, L]. inverse_propensity_L: float64, of the training part.
    Raises ValueError where no row has a label, or fewer labels were predicted than are to be looked at.
    """
    deepest = max(*precision_at, *recall_at)
    if predicted_Bk.shape[1] < deepest:
        raise ValueError(f"metrics to {deepest} labels need as many predictions; found {predicted_Bk.shape[1]}")
    counts_B = np.diff(relevance.indptr)
    labelled = np.flatnonzero(counts_B)
    if not len(labelled):
        raise ValueError("no row has a label: there is nothing to measure")
    relevance, counts_B = relevance[labelled], counts_B[labelled]
    predicted_Bk = predicted_Bk[labelled, :deepest]
    hits_Bk = _hits(predicted_Bk, relevance)
    weights_Bk = np.where(hits_Bk, inverse_propensity_L[np.maximum(predicted_Bk, 0)], 0.0)
    ideal_Bk = _best_weights(relevance, inverse_propensity_L, max(precision_at))
    discounts = 1 / np.log2(np.arange(2, deepest + 2))
    ideal_dcg = np.concatenate([[0], np.cumsum(discounts)])
    table = {}
    for k in precision_at:
        table[f"P@{k}"] = hits_Bk[:, :k].sum(1).mean() / k
    for k in precision_at:
        table[f"nDCG@{k}"] = (hits_Bk[:, :k] @ discounts[:k] / ideal_dcg[np.minimum(k, counts_B)]).mean()
    for k in precision_at:
        table[f"PSP@{k}"] = weights_Bk[:, :k].sum() / ideal_Bk[:, :k].sum()
    for k in recall_at:
        table[f"R@{k}"] = (hits_Bk[:, :k].sum(1) / counts_B).mean()
    return {name: 100 * float(value) for name, value in table.items()}


def _hits(predicted_Bk: np.ndarray, relevance: sp.csr_matrix) -> np.ndarray:
    """bool [B, k]: whether each prediction is relevant. Sorted search, no dense [B, L]."""
    B, L = relevance.shape
    relevant = np.repeat(np.arange(B), np.diff(relevance.indptr)) * L + relevance.indices
    relevant.sort()
    wanted = np.arange(B)[:, None] * L + predicted_Bk
    at = np.minimum(np.searchsorted(relevant, wanted), len(relevant) - 1)
    return (relevant[at] == wanted) & (predicted_Bk >= 0)


def _best_weights(relevance: sp.csr_matrix, weights_L: np.ndarray, k: int) -> np.ndarray:
    """float64 [B, k]: the k largest weights among each row's labels, descending, 0 where it has fewer."""
    counts = np.diff(relevance.indptr)
    row = np.repeat(np.arange(len(counts)), counts)
    weight = weights_L[relevance.indices]
    order = np.lexsort((-weight, row))
    rank = np.arange(len(row)) - np.repeat(relevance.indptr[:-1], counts)
    best = np.zeros((len(counts), k))
    top = rank < k
    best[row[top], rank[top]] = weight[order][top]
    return best
