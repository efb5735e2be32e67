"""Which instances and labels make up each batch: a pure function of (seed, epoch, step, rank, ranks) and of what
was mined, so that a run that starts again replays exactly the batches that it would have had."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.sparse as sp

from raexmc_ray.ragged import ragged_take


@dataclass(frozen=True)
class Mined:
    """What one search for hard negatives found, for all instances that have a label.

    grouped: int64, those instances, neighbours next to each other; groups: int64 [groups + 1], where the groups
    of neighbours start in it; empty where batches are random.
    labels: int32 [N, depth], the nearest labels of each instance that are not its own, −1 at a row's end.
    """

    grouped: np.ndarray
    groups: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Pairs (row, column) in the order of their rows, as in CSR: columns[offsets[row] : offsets[row + 1]]."""

    offsets: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, matrix: sp.csr_matrix) -> Pairs:
        """The places at which `matrix` stores a value."""
        return cls(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64))


@dataclass(frozen=True)
class Batch:
    """One rank's view of a batch over all ranks.

    rows_B: int64, distinct instances. labels_C: int64, distinct labels, ascending: drawn positives and mined ones.
    start, stop: this rank's queries are rows_B[start:stop]; row 0 of the pairs is the first of them.
    drawn, known: (query, column of labels_C); the positives drawn for the query, and all labels known to fit it in
        the full training relevance. shared: (query, column of rows_B), instances that share a label with it,
        itself included. votes: (label of labels_C, instance of rows_B), all that are known to fit each other.
    """

    rows_B: np.ndarray
    labels_C: np.ndarray
    start: int
    stop: int
    drawn: Pairs
    known: Pairs
    shared: Pairs
    votes: Pairs


class Sampler:
    """Cuts each epoch's order of the labelled instances into batches, and draws their positives and negatives."""

    def __init__(
        self,
        relevance: sp.csr_matrix,
        batch_size: int,
        positives: int,
        seed: int,
        *,
        mined_labels: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """relevance: CSR [N, L] of the training part. positives: labels drawn for each instance (P).
        mined_labels: hard negatives drawn for each (M), once `mined` is set."""
        self.relevance = relevance
        self.labelled = np.flatnonzero(np.diff(relevance.indptr))
        self.batch_size = batch_size
        self.positives = positives
        self.mined_labels = mined_labels
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self._mined: Mined | None = None
        self._order = lru_cache(1)(self._epoch_order)
        if self.steps == 0:
            raise ValueError(
                f"training.batch_size is {batch_size}, but only {len(self.labelled)} training instances have "
                "a label: make the batch smaller"
            )

    @property
    def steps(self) -> int:
        """Batches in an epoch. A last, smaller batch is left out: other rows each epoch."""
        return len(self.labelled) // self.batch_size

    def use(self, mined: Mined) -> None:
        """Take batches of neighbours and hard negatives from `mined`, from now on."""
        self._mined = mined
        self._order.cache_clear()

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's view of batch `step` (from 0) of `epoch` (from 0)."""
        rows_B = self.rows(epoch, step)
        relevance = self.relevance[rows_B]
        rng = np.random.default_rng([self.seed, epoch, step])
        drawn_rows, drawn_labels = self._draw_positives(relevance, rng)
        labels_C = np.unique(np.concatenate([drawn_labels, self._draw_mined(rows_B, rng)]))
        per_rank = len(rows_B) // self.ranks
        start, stop = self.rank * per_rank, (self.rank + 1) * per_rank
        mine = (drawn_rows >= start) & (drawn_rows < stop)
        columns = np.searchsorted(labels_C, drawn_labels[mine])
        drawn = sp.csr_matrix(
            (np.ones(len(columns), bool), (drawn_rows[mine] - start, columns)), shape=(per_rank, len(labels_C))
        )
        known = _known(relevance, labels_C)
        return Batch(
            rows_B,
            labels_C,
            start,
            stop,
            Pairs.of(drawn),
            known=Pairs.of(known[start:stop]),
            shared=Pairs.of(relevance[start:stop] @ relevance.T),
            votes=Pairs.of(known.T.tocsr()),
        )

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """int64 [B]: the instances of a batch, of all ranks."""
        return self._order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        if self._mined is None or not len(self._mined.grouped):
            return rng.permutation(self.labelled)
        groups = self._mined.groups
        order, _ = ragged_take(self._mined.grouped, groups, rng.permutation(len(groups) - 1))
        return order

    def _draw_positives(self, relevance: sp.csr_matrix, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(row, label) of up to P labels of each row, uniformly and without replacement: those of the least lots."""
        starts, counts = relevance.indptr[:-1], np.diff(relevance.indptr)
        rows, lots = np.repeat(np.arange(len(counts)), counts), rng.random(relevance.nnz)
        chosen = []
        for _ in range(self.positives):  # no sort of all pairs: a batch of a large corpus has half a million
            least = np.minimum.reduceat(lots, starts)
            places = np.flatnonzero((lots == np.repeat(least, counts)) & (lots < 1))
            if not len(places):
                break
            lots[places] = 1
            chosen.append(places)
        places = np.concatenate(chosen)
        return rows[places], relevance.indices[places].astype(np.int64)

    def _draw_mined(self, rows_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64: up to M of each row's nearest wrong labels, uniformly and without replacement."""
        if self._mined is None or not self.mined_labels:
            return np.empty(0, np.int64)
        candidates = self._mined.labels[rows_B]
        lots = np.where(candidates >= 0, rng.random(candidates.shape), 2.0)
        chosen = np.argsort(lots, axis=1)[:, : self.mined_labels]
        labels = np.take_along_axis(candidates, chosen, 1)
        return labels[labels >= 0].astype(np.int64)


def _known(relevance: sp.csr_matrix, labels_C: np.ndarray) -> sp.csr_matrix:
    """CSR bool [rows, C]: the labels of labels_C (ascending) that `relevance` has."""
    column = np.full(relevance.shape[1], -1, np.int32)
    column[labels_C] = np.arange(len(labels_C))
    at = column[relevance.indices]
    found = at >= 0
    kept = np.concatenate([[0], np.cumsum(found)])
    columns = at[found]
    shape = (relevance.shape[0], len(labels_C))
    return sp.csr_matrix((np.ones(len(columns), bool), columns, kept[relevance.indptr]), shape=shape)
