"""Which instances and labels make up each batch: a pure function of (seed, epoch, step), so that a run that
starts again replays exactly the batches that it would have had."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True)
class Batch:
    """A batch over all ranks.

    rows_B: int64, distinct instances. labels_C: int64, distinct labels, ascending: the drawn positives.
    drawn_BC, known_BC: bool; which labels were drawn for a row, and which of them are known to fit it in the
    full training relevance. shared_BB: bool; rows that share a label (a row with itself included).
    """

    rows_B: np.ndarray
    labels_C: np.ndarray
    drawn_BC: np.ndarray
    known_BC: np.ndarray
    shared_BB: np.ndarray


class Sampler:
    """Cuts each epoch's permutation of the labelled instances into batches, and draws their positives."""

    def __init__(self, relevance: sp.csr_matrix, batch_size: int, positives: int, seed: int) -> None:
        """relevance: CSR [N, L] of the training part. positives: labels drawn for each instance (P)."""
        self.relevance = relevance
        self.labelled = np.flatnonzero(np.diff(relevance.indptr))
        self.batch_size = batch_size
        self.positives = positives
        self.seed = seed
        if self.steps == 0:
            raise ValueError(
                f"training.batch_size is {batch_size}, but only {len(self.labelled)} training instances have "
                "a label: make the batch smaller"
            )

    @property
    def steps(self) -> int:
        """Batches in an epoch. A last, smaller batch is left out: other rows each epoch."""
        return len(self.labelled) // self.batch_size

    def batch(self, epoch: int, step: int) -> Batch:
        """Batch `step` (from 0) of `epoch` (from 0)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.labelled)
        rows_B = order[step * self.batch_size : (step + 1) * self.batch_size]
        relevance = self.relevance[rows_B]
        drawn_rows, drawn_labels = self._draw(relevance, np.random.default_rng([self.seed, epoch, step]))
        labels_C, drawn_columns = np.unique(drawn_labels, return_inverse=True)
        drawn_BC = np.zeros((len(rows_B), len(labels_C)), bool)
        drawn_BC[drawn_rows, drawn_columns] = True
        return Batch(
            rows_B,
            labels_C,
            drawn_BC,
            known_BC=relevance[:, labels_C].toarray() > 0,
            shared_BB=(relevance @ relevance.T).toarray() > 0,
        )

    def _draw(self, relevance: sp.csr_matrix, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(row, label) of up to P labels of each row, uniformly and without replacement."""
        counts = np.diff(relevance.indptr)
        rows = np.repeat(np.arange(len(counts)), counts)
        shuffled = np.lexsort((rng.random(len(rows)), rows))
        rank = np.arange(len(rows)) - np.repeat(relevance.indptr[:-1], counts)
        chosen = shuffled[rank < self.positives]
        return rows[chosen], relevance.indices[chosen].astype(np.int64)
