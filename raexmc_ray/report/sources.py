"""Where the retrieved keys come from, instances or labels, and what each kind is worth."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from raexmc_ray.memory.hits import Hits
from raexmc_ray.predict import Predictions, vote_evidence, weigh
from raexmc_ray.recipe import PredictionSection
from raexmc_ray.report.findings import KindOfKeys, Reach, Sources

FIRST = 5
"""Predicted labels whose scores are looked into."""
LEAST = 20
"""Keys of a kind at a rank, of which a share is taken at least."""
KINDS = 2


class SourceCounts:
    """Adds up, a batch at a time, over the rows that have a label. Kind 0 are instances, kind 1 labels."""

    def __init__(self, width: int) -> None:
        """width: keys that are retrieved for a row."""
        self._keys, self._judged, self._right = np.zeros((3, KINDS, width))
        self._mass = np.zeros(KINDS)
        self._reached = np.zeros(4)
        self._label_shares: list[np.ndarray] = []
        self._outcomes: list[np.ndarray] = []

    def add(
        self,
        hits: Hits,
        predictions: Predictions,
        relevance: sp.csr_matrix,
        exclude: sp.csr_matrix,
        settings: PredictionSection,
    ) -> None:
        """The hits at `settings` of B rows, what was predicted from them, the rows' labels and their filter pairs: CSR
        [B, L]. A key that votes for filter pairs only is neither right nor wrong."""
        labelled_B = np.diff(relevance.indptr) > 0
        B, b = hits.key_ids_Bb.shape
        there_Bb = (hits.key_ids_Bb >= 0) & labelled_B[:, None]
        kind_Bb = hits.is_label_Bb.astype(np.int64)
        L = relevance.shape[1]
        relevant = _pairs(relevance)
        cell = np.repeat(np.arange(B * b), np.diff(hits.vote_offsets))
        vote = cell // max(1, b) * L + hits.votes
        judged = ~np.isin(vote, _pairs(exclude))
        judged_cells, right_cells = np.zeros((2, B * b), bool)
        judged_cells[cell[judged]] = True
        right_cells[cell[judged & np.isin(vote, relevant)]] = True  # a filter pair may be relevant, too
        judged_Bb, right_Bb = judged_cells.reshape(B, b), right_cells.reshape(B, b)
        # λ = 1/2 weighs both kinds alike: twice that is the softmax mass.
        mass_Bb = 2 * weigh(hits, 0.5, settings.temperature)
        for kind in range(KINDS):
            mine_Bb = there_Bb & (kind_Bb == kind)
            self._keys[kind, :b] += mine_Bb.sum(0)
            self._judged[kind, :b] += (mine_Bb & judged_Bb).sum(0)
            self._right[kind, :b] += (mine_Bb & right_Bb).sum(0)
            self._mass[kind] += mass_Bb[mine_Bb].sum()
        by_label = np.isin(relevant, vote[hits.is_label_Bb.ravel()[cell]])
        by_instance = np.isin(relevant, vote[~hits.is_label_Bb.ravel()[cell]])
        self._reached += np.bincount(by_instance + 2 * by_label, minlength=4)
        first = Predictions(predictions.labels_Bk[:, :FIRST], predictions.scores_Bk[:, :FIRST])
        said = vote_evidence(hits, first, lambda_=settings.lambda_, temperature=settings.temperature, keys=0)
        looked_at = ((first.labels_Bk >= 0) & labelled_B[:, None]).ravel()
        codes = (np.arange(B)[:, None] * L + first.labels_Bk).ravel()
        self._label_shares.append(said.label_shares[looked_at])
        self._outcomes.append(np.isin(codes, relevant)[looked_at])

    def sources(self) -> Sources:
        """Of all rows so far."""
        reach = self._reached / max(1.0, self._reached.sum())
        shares = np.concatenate([np.empty(0, np.float32), *self._label_shares])
        right = np.concatenate([np.empty(0, bool), *self._outcomes])
        instances, labels = map(self._kind, range(KINDS))
        return Sources(
            instances=instances,
            labels=labels,
            reach=Reach(neither=reach[0], instances_only=reach[1], labels_only=reach[2], both=reach[3]),
            label_share_right=float(shares[right].mean()) if right.any() else None,
            label_share_wrong=float(shares[~right].mean()) if not right.all() else None,
        )

    def _kind(self, kind: int) -> KindOfKeys:
        keys, judged, right = self._keys[kind], self._judged[kind], self._right[kind]
        at_rank = self._keys.sum(0)
        ranks = int((at_rank > 0).sum())
        return KindOfKeys(
            keys=keys.sum() / max(1.0, at_rank.sum()),
            mass=self._mass[kind] / max(np.finfo(float).tiny, self._mass.sum()),
            right=right.sum() / judged.sum() if judged.sum() else None,
            share_by_rank=(keys[:ranks] / at_rank[:ranks]).tolist(),
            right_by_rank=[right[r] / judged[r] if judged[r] >= LEAST else None for r in range(ranks)],
        )


def _pairs(matrix: sp.csr_matrix) -> np.ndarray:
    """int64: row · L + label of each pair of a CSR [B, L]."""
    rows, labels = matrix.shape
    return np.repeat(np.arange(rows), np.diff(matrix.indptr)) * labels + matrix.indices
