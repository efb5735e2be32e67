"""Prediction: p̂ = softmax(q Kᵀ / τ) V over the retrieved keys (RAE-XMC, arXiv 2502.10615).

An instance among the hits votes for its labels with weight λ, a label for itself with 1 − λ.
`aggregate` turns hits into labels; `vote_evidence` says which keys a label owes its score to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from raexmc_ray.memory.hits import Hits
from raexmc_ray.memory.order import best_columns
from raexmc_ray.ragged import rank_in_row

BY_SIMILARITY = 0.05
"""A τ at which labels that only their own keys vote for stand in the order of their similarities: at far lower ones
most have no score (a float32 says no less than 1e-45), at far higher ones near ones have the same."""

BLOCK_CELLS = 1 << 18
"""Votes, padding included, that are summed at once: of 64 queries with 200 neighbours of 20 labels. Larger arrays would
be memory that the kernel clears anew each time, which takes a quarter of the whole time."""


@dataclass(frozen=True)
class Predictions:
    """The best k labels of B queries, each row in the order (score descending, label ascending).

    labels_Bk: int64, −1 where fewer labels got a vote (at a row's end). scores_Bk: float32, 0 there.
    """

    labels_Bk: np.ndarray
    scores_Bk: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_Bk)


@dataclass(frozen=True)
class Evidence:
    """The keys that voted for predicted labels: for cell i = row · k + rank those at offsets[i]..offsets[i+1],
    the largest share first, then the smallest key id.

    offsets: int64 [B·k + 1]. key_ids: int64. similarities: float32, cosine of query and key. shares: float32,
    the part of the label's score that the key gave, in (0, 1]. label_shares: float32 [B·k], the part that the
    label's own key gave, in [0, 1]; instances gave the rest.
    """

    offsets: np.ndarray
    key_ids: np.ndarray
    similarities: np.ndarray
    shares: np.ndarray
    label_shares: np.ndarray


@dataclass(frozen=True)
class _Votes:
    """Every vote of every hit that weighs something: its query, its label, its hit's place, its weight."""

    row: np.ndarray
    label: np.ndarray
    place: np.ndarray
    weight: np.ndarray


def aggregate(
    hits: Hits,
    *,
    lambda_: float,
    temperature: float,
    k: int,
    exclude: sp.csr_matrix | None = None,
    allowed: np.ndarray | None = None,
    blocked: np.ndarray | None = None,
) -> Predictions:
    """The best k labels by p̂. Labels that no hit votes for have no score.

    lambda_: λ in [0, 1]. temperature: τ > 0. exclude: CSR [B, L]; pairs that are dropped before the best k are
    taken. allowed, blocked: labels that alone may be answered, that may not be; others' scores stay what they are.
    Sums are taken in float64 in the order of the hits, and rounded to float32 before they are ordered.
    """
    blocks = _row_blocks(hits)
    if len(blocks) > 1:
        parts = [
            aggregate(
                hits.rows(start, stop),
                lambda_=lambda_,
                temperature=temperature,
                k=k,
                exclude=None if exclude is None else exclude[start:stop],
                allowed=allowed,
                blocked=blocked,
            )
            for start, stop in blocks
        ]
        labels, scores = ([getattr(part, name) for part in parts] for name in ("labels_Bk", "scores_Bk"))
        return Predictions(np.concatenate(labels), np.concatenate(scores))
    labels_BW, scores_BW = _mass(hits, weigh(hits, lambda_, temperature))
    B, W = scores_BW.shape
    if allowed is not None:
        scores_BW[~np.isin(labels_BW, allowed)] = 0
    if blocked is not None:
        scores_BW[np.isin(labels_BW, blocked)] = 0
    if exclude is not None and exclude.nnz:
        # Cells without a label have the largest number of their type: as it is, rows would overflow.
        span = 1 + max(exclude.shape[1], int(hits.votes.max(initial=0)) + 1)
        labels = np.minimum(labels_BW, span - 1).astype(np.int64)
        cells = (np.arange(B)[:, None] * span + labels).ravel()  # ascending
        excluded = np.repeat(np.arange(B), np.diff(exclude.indptr)) * span + exclude.indices
        at = np.searchsorted(cells, excluded)  # the first of its cells, which has the score
        at, excluded = at[at < len(cells)], excluded[at < len(cells)]
        scores_BW.ravel()[at[cells[at] == excluded]] = 0
    # Sorted are only the cells that a partition leaves in question. A score of 0 is none: such cells get numbers of
    # their own, for a partition of many equal ones takes ten times as long.
    there_BW = scores_BW > 0
    if k < W:
        parted_BW = np.where(there_BW, scores_BW, -np.arange(W, dtype=np.float32))
        parted_BW.partition(W - k, axis=1)
        there_BW &= scores_BW >= parted_BW[:, W - k, None]
    best = np.flatnonzero(there_BW)
    row = best // max(1, W)
    rank = rank_in_row(row)
    shape = B, max(k, 1 + int(rank.max(initial=-1)))
    scores_Bn, labels_Bn = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
    scores_Bn[row, rank], labels_Bn[row, rank] = scores_BW.ravel()[best], labels_BW.ravel()[best]
    columns = best_columns(scores_Bn, labels_Bn, k)
    labels_Bk, scores_Bk = np.take_along_axis(labels_Bn, columns, 1), np.take_along_axis(scores_Bn, columns, 1)
    return Predictions(labels_Bk, np.where(labels_Bk >= 0, scores_Bk, np.float32(0)))


def _row_blocks(hits: Hits) -> list[tuple[int, int]]:
    """(start, stop) of rows that are summed together: as many in a row as BLOCK_CELLS allows where each takes as much
    memory as the one with the most votes, which may have thousands of times those of others."""
    B, b = hits.key_ids_Bb.shape
    votes_B = np.diff(hits.vote_offsets[:: b or 1]) if B else np.empty(0, np.int64)
    if len(votes_B) * votes_B.max(initial=0) <= BLOCK_CELLS:
        return [(0, B)]
    blocks, start, most = [], 0, 0
    for row, votes in enumerate(votes_B.tolist()):
        most = max(most, votes)
        if row > start and most * (row + 1 - start) > BLOCK_CELLS:
            blocks.append((start, row))
            start, most = row, votes
    return [*blocks, (start, B)]


def _mass(hits: Hits, weights_Bb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels_BW unsigned, scores_BW float32): each label that a row's hits vote for, ascending, with the sum of its
    votes in the first of as many cells as it has votes; the others, and those beyond a row's votes, have score 0.

    Sums are taken in float64 in the order of the hits.
    """
    B, b = weights_Bb.shape
    # A vote is one number, its label and then its hit's place, which NumPy sorts by the vector: twice as fast as a
    # sparse product adds them up, which reads a dense row of all labels at random. Places beyond b weigh nothing.
    bits = b.bit_length()
    labels = 2 + int(hits.votes.max(initial=-1))
    dtype: np.dtype[Any] = np.dtype(np.uint32 if labels << bits <= 1 << 32 else np.uint64)
    heavy = weights_Bb.ravel() > 0  # at a λ of 0 or 1, or a low τ, many hits weigh nothing
    lengths = np.diff(hits.vote_offsets)
    votes = hits.votes if heavy.all() else hits.votes[np.repeat(heavy, lengths)]
    lengths = lengths * heavy
    votes_B = lengths.reshape(B, b).sum(axis=1)
    places = np.repeat(np.tile(np.arange(b, dtype=dtype), B), lengths)
    packed_BW = np.full((B, votes_B.max(initial=0)), np.iinfo(dtype).max, dtype)
    is_vote_BW = np.arange(packed_BW.shape[1]) < votes_B[:, None]
    packed_BW[is_vote_BW] = (votes.astype(dtype) << dtype.type(bits)) | places
    packed_BW.sort(axis=1)
    labels_BW = packed_BW >> dtype.type(bits)
    weights = np.zeros((B, 1 << bits))
    weights[:, :b] = weights_Bb
    places_BW = (packed_BW & dtype.type((1 << bits) - 1)).astype(np.intp) + (np.arange(B) << bits)[:, None]
    votes_BW = np.take(weights, places_BW)
    first_BW = np.ones(packed_BW.shape, bool)
    np.not_equal(labels_BW[:, 1:], labels_BW[:, :-1], out=first_BW[:, 1:])
    scores_BW = np.zeros(packed_BW.shape, np.float32)
    scores_BW[first_BW] = np.bincount(np.cumsum(first_BW) - 1, votes_BW.ravel()) if first_BW.size else 0
    return labels_BW, scores_BW


def vote_evidence(hits: Hits, predictions: Predictions, *, lambda_: float, temperature: float, keys: int) -> Evidence:
    """For each predicted label the `keys` hits that gave it most, with λ and τ as in `aggregate`."""
    votes = _votes(hits, weigh(hits, lambda_, temperature))
    B, k = predictions.labels_Bk.shape
    span = 1 + max(votes.label.max(initial=0), predictions.labels_Bk.max(initial=0))
    cells = np.flatnonzero(predictions.labels_Bk.ravel() >= 0)
    codes = (cells // k) * span + predictions.labels_Bk.ravel()[cells]
    by_code = np.argsort(codes)
    wanted = votes.row * span + votes.label
    at = np.minimum(np.searchsorted(codes[by_code], wanted), max(len(codes) - 1, 0))
    known = codes[by_code][at] == wanted if len(codes) else np.zeros(len(wanted), bool)
    cell = cells[by_code[at[known]]] if len(codes) else np.empty(0, np.int64)
    row, place, weight = votes.row[known], votes.place[known], votes.weight[known]
    key_ids = hits.key_ids_Bb[row, place]
    order = np.lexsort((key_ids, -weight, cell))
    cell, row, place, weight, key_ids = (a[order] for a in (cell, row, place, weight, key_ids))
    start = np.searchsorted(cell, np.arange(B * k + 1))
    totals = np.bincount(cell, weight, minlength=B * k)
    from_labels = np.bincount(cell, weight * hits.is_label_Bb[row, place], minlength=B * k)
    shares = (weight / totals[cell]).astype(np.float32)
    top = (np.arange(len(cell)) - start[cell] < keys) & (shares > 0)
    offsets = np.searchsorted(cell[top], np.arange(B * k + 1))
    return Evidence(
        offsets.astype(np.int64),
        key_ids[top],
        hits.scores_Bb[row[top], place[top]],
        shares[top],
        (from_labels / np.where(totals > 0, totals, 1)).astype(np.float32),
    )


def weigh(hits: Hits, lambda_: float, temperature: float) -> np.ndarray:
    """float64 [B, b]: what each hit's vote weighs: softmax over the hits at τ, times λ or 1 − λ. Raises ValueError."""
    if not 0 <= lambda_ <= 1:
        raise ValueError(f"lambda is {lambda_}: it must lie in [0, 1]")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    found = hits.key_ids_Bb >= 0
    scores = np.where(found, hits.scores_Bb, -np.inf).astype(np.float64)
    highest = np.max(scores, axis=1, keepdims=True, initial=-2.0)  # −2: no cosine is so low
    weights_Bb = np.exp((scores - highest) / temperature)
    weights_Bb /= np.maximum(weights_Bb.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return weights_Bb * np.where(hits.is_label_Bb, 1 - lambda_, lambda_)


def _votes(hits: Hits, weights_Bb: np.ndarray) -> _Votes:
    lengths = np.diff(hits.vote_offsets)
    cell = np.repeat(np.arange(len(lengths)), lengths)
    row, place = np.divmod(cell, hits.key_ids_Bb.shape[1])
    weight = weights_Bb[row, place]
    heavy = weight > 0
    return _Votes(row[heavy], hits.votes[heavy].astype(np.int64), place[heavy], weight[heavy])
