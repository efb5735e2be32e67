"""Every metric over 1 million rows, a hundred predictions each, of 1.3 million labels; and the plain way beside it.

Labels are drawn by Zipf's law, about five a row; of the predictions some are right, the rest are other labels. What is
timed is all that an evaluation makes of predictions: `inverse_propensity`, P, nDCG, PSP, PSnDCG and R, coverage, head,
torso, tail and tenths, and the figures of every row. Data and the reading of it are not counted.

The plain way is what pyxclib does: predictions as a sparse matrix, its rows' entries in order, and a look at the
relevance for each place. It is run on the first tenth of the rows, and takes time in proportion to rows: the target is
the time of ours over all rows against ten times that. The figures of both are compared. Two threads at most.
"""

from __future__ import annotations

import os
import resource
import threading
import time

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import psutil
import pyarrow as pa
import scipy.sparse as sp
from _result import at_least, below, print_targets, write_result

from raexmc_ray.evaluation.breakdown import GroupCounts
from raexmc_ray.metrics import inverse_propensity, judge, metrics_of, row_figures

ROWS, DEPTH, LABELS, A_ROW = 1_000_000, 100, 1_300_000, 5
PART = 10
"""The plain way is run on one row in so many."""
A, B = 0.6, 2.6
FOUND = (0.6, 0.3)
"""This share of a row's labels is predicted, at a place that is drawn: each has this chance, the first ones first."""


def main() -> None:
    train, relevance, predicted = made_up()
    before = psutil.Process().memory_info().rss
    with Peak() as peak:
        started = time.perf_counter()
        inverse = inverse_propensity(train, A, B)
        judged = judge(predicted, relevance, DEPTH)
        looked_up = time.perf_counter()
        figures = row_figures(judged, inverse)
        table = metrics_of(figures)
        measured = time.perf_counter()
        groups = GroupCounts(np.bincount(train.indices, minlength=LABELS), DEPTH)
        groups.add("both", judged)
        breakdown = groups.breakdown()
        ended = time.perf_counter()

    part = ROWS // PART
    few = judge(predicted[:part], relevance[:part], DEPTH)
    ours = metrics_of(row_figures(few, inverse))
    plain_started = time.perf_counter()
    theirs = plain(predicted[:part], relevance[:part], inverse)
    plain_s = time.perf_counter() - plain_started
    assert all(abs(ours[name] - value) < 1e-6 for name, value in theirs.items()), (ours, theirs)

    seconds = ended - started
    numbers = {
        "rows": ROWS,
        "predictions_a_row": DEPTH,
        "labels": LABELS,
        "labels_a_row": round(relevance.nnz / ROWS, 2),
        "seconds": round(seconds, 1),
        "look_up_s": round(looked_up - started, 1),
        "row_figures_s": round(measured - looked_up, 1),
        "breakdown_s": round(ended - measured, 1),
        "input_gb": round((predicted.nbytes + sum(a.nbytes for a in (relevance.indices, relevance.indptr))) / 1e9, 2),
        "peak_gb_above_input": round((peak.bytes - before) / 1e9, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "plain_rows": part,
        "plain_s": round(plain_s, 1),
        "plain_s_for_all_rows": round(PART * plain_s, 1),
        "table": {name: round(value, 2) for name, value in table.items()},
        "head_torso_tail_recall": [round(group.recall["both"], 2) for group in breakdown.thirds],
        "arrow_mb": round(pa.table({name: pa.array(column) for name, column in figures.items()}).nbytes / 1e6),
    }
    targets = [
        below("seconds for all rows", seconds, 60),
        at_least("plain seconds, times ten, / ours", PART * plain_s / seconds, 1.0),
    ]
    write_result("metrics_scale", numbers, targets)
    print_targets(numbers, targets)


def made_up() -> tuple[sp.csr_matrix, sp.csr_matrix, np.ndarray]:
    """(relevance of a training part of twice as many rows, relevance of the rows, int32 predictions [rows, depth])."""
    rng = np.random.default_rng(0)
    train, relevance = zipf_matrix(rng, 2 * ROWS), zipf_matrix(rng, ROWS)
    predicted = zipf_labels(rng, ROWS * DEPTH).reshape(ROWS, DEPTH)
    for start in range(0, ROWS, 50_000):  # in blocks: only what is measured should need memory
        stop = start + 50_000
        block, rows = predicted[start:stop], relevance[start:stop]
        row = np.repeat(np.arange(len(block)), np.diff(rows.indptr))
        some = rng.random(rows.nnz) < FOUND[0]
        place = np.minimum(rng.geometric(FOUND[1], rows.nnz) - 1 + np.arange(rows.nnz) % A_ROW, DEPTH - 1)
        block[row[some], place[some]] = rows.indices[some]
        # A label stands once in a row: its later places become −1, as if fewer had been predicted.
        order = np.argsort(block, axis=1, kind="stable")
        ordered = np.take_along_axis(block, order, 1)
        again = np.zeros(block.shape, bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        unsorted = np.zeros(block.shape, bool)
        np.put_along_axis(unsorted, order, again, 1)
        block[unsorted] = -1
    return train, relevance, predicted


def zipf_labels(rng: np.random.Generator, size: int) -> np.ndarray:
    """int32: label i with a frequency of about 1 / (i + 1), by inverting the distribution function."""
    return (np.exp(rng.random(size, np.float32) * np.float32(np.log(LABELS))) - 1).astype(np.int32)


def zipf_matrix(rng: np.random.Generator, rows: int) -> sp.csr_matrix:
    """CSR of ones: about A_ROW labels a row, none in a few rows."""
    counts = rng.poisson(A_ROW, rows)
    row = np.repeat(np.arange(rows), counts)
    matrix = sp.coo_matrix((np.ones(len(row), np.float32), (row, zipf_labels(rng, len(row)))), (rows, LABELS)).tocsr()
    matrix.data[:] = 1
    return sp.csr_matrix(matrix)


def plain(predicted: np.ndarray, relevance: sp.csr_matrix, inverse: np.ndarray) -> dict[str, float]:
    """P, nDCG, PSP, PSnDCG and R the way pyxclib goes: sparse matrices of scores, a place at a time."""
    kept = np.diff(relevance.indptr) > 0
    predicted, relevance = predicted[kept], relevance[kept]
    rows, depth = predicted.shape
    hits = np.zeros(predicted.shape)
    for place in range(depth):
        there = predicted[:, place] >= 0
        hits[there, place] = np.asarray(relevance[np.flatnonzero(there), predicted[there, place]]).ravel()
    counts = np.diff(relevance.indptr)
    weighed = sp.csr_matrix(relevance @ sp.diags_array(inverse))
    ideal = np.zeros((rows, 5))
    for row in range(rows):
        best = np.sort(weighed.data[weighed.indptr[row] : weighed.indptr[row + 1]])[::-1][:5]
        ideal[row, : len(best)] = best
    gains = hits[:, :5] * inverse[np.maximum(predicted[:, :5], 0)]
    discounts = 1 / np.log2(np.arange(2, 7))
    full = np.concatenate([[0], np.cumsum(discounts)])
    table = {}
    for k in (1, 3, 5):
        over = full[np.minimum(counts, k)]
        table[f"P@{k}"] = 100 * hits[:, :k].sum(1).mean() / k
        table[f"nDCG@{k}"] = 100 * (hits[:, :k] @ discounts[:k] / over).mean()
        table[f"PSP@{k}"] = 100 * gains[:, :k].sum() / ideal[:, :k].sum()
        table[f"PSnDCG@{k}"] = (
            100 * (gains[:, :k] @ discounts[:k] / over).sum() / (ideal[:, :k] @ discounts[:k] / over).sum()
        )
    for k in (10, 100):
        table[f"R@{k}"] = 100 * (hits[:, :k].sum(1) / counts).mean()
    return table


class Peak:
    """The most memory that this process has while in use, looked at a hundred times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._end.wait(0.01):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


if __name__ == "__main__":
    main()
