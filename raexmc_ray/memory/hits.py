"""What a search finds, and how the answers of shards become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raexmc_ray.ragged import ragged_places, rank_in_row
from raexmc_ray.recipe import Neighbours


@dataclass(frozen=True)
class Hits:
    """The retrieved keys of B queries, each row in the order (score descending, key id ascending).

    key_ids_Bb: int64, −1 where a row has fewer keys (at its end). scores_Bb: float32, −∞ there.
    is_label_Bb: bool; whether the key is a label's (else an instance's).
    votes: int32, the labels that the hits vote for, of all hits one after the other, padding included (it has
    none); vote_offsets: int64 [B·b + 1]. snapshot: the id of the snapshot that was searched.
    """

    key_ids_Bb: np.ndarray
    scores_Bb: np.ndarray
    is_label_Bb: np.ndarray
    votes: np.ndarray
    vote_offsets: np.ndarray
    snapshot: str

    def rows(self, start: int, stop: int) -> Hits:
        """The hits of queries start … stop − 1."""
        width = self.key_ids_Bb.shape[1]
        offsets = self.vote_offsets[start * width : stop * width + 1]
        return Hits(
            self.key_ids_Bb[start:stop],
            self.scores_Bb[start:stop],
            self.is_label_Bb[start:stop],
            self.votes[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            self.snapshot,
        )

    def with_rows(self, rows: np.ndarray, other: Hits) -> Hits:
        """These hits, but with those of `other` for the queries `rows`."""
        shape = self.key_ids_Bb.shape
        starts, lengths = self.vote_offsets[:-1].reshape(shape).copy(), np.diff(self.vote_offsets).reshape(shape)
        starts[rows] = len(self.votes) + other.vote_offsets[:-1].reshape(other.key_ids_Bb.shape)
        lengths[rows] = np.diff(other.vote_offsets).reshape(other.key_ids_Bb.shape)
        key_ids, scores, is_label = self.key_ids_Bb.copy(), self.scores_Bb.copy(), self.is_label_Bb.copy()
        key_ids[rows], scores[rows], is_label[rows] = other.key_ids_Bb, other.scores_Bb, other.is_label_Bb
        votes = np.concatenate([self.votes, other.votes])[ragged_places(starts.ravel(), lengths.ravel())]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Hits(key_ids, scores, is_label, votes, offsets, self.snapshot)

    def cut(self, neighbours: Neighbours, without: np.ndarray | None = None) -> Hits:
        """The best `neighbours` of these hits. without: int64 [B], a key of each query that is left out."""
        hits = self
        if without is not None:
            left_out = self.key_ids_Bb == without[:, None]
            scores_Bb = np.where(left_out, np.float32(-np.inf), self.scores_Bb)
            hits = replace(self, key_ids_Bb=np.where(left_out, -1, self.key_ids_Bb), scores_Bb=scores_Bb)
        return merge_hits([hits], neighbours)


class SnapshotMismatchError(RuntimeError):
    """Shards answered from different snapshots; such answers are never merged."""


def asked_of_a_shard(neighbours: Neighbours, shards: int) -> Neighbours:
    """How many of the memory's best keys each of its shards is asked for first.

    Keys are dealt to shards by id, so each has 1/shards of the best b, give or take: four standard deviations more
    than that are nearly always enough, and a fraction of what would have to be found, sent and merged otherwise.
    """

    def share(b: int | None) -> int | None:
        return b and min(b, math.ceil(b / shards + 4 * math.sqrt(b / shards)))

    return Neighbours(
        joint=share(neighbours.joint), instances=share(neighbours.instances), labels=share(neighbours.labels)
    )


def unsettled(parts: Sequence[Hits], merged: Hits, asked: Neighbours) -> np.ndarray:
    """Rows of `merged` that may lack keys: those in which the last key that some part was asked for is among the best,
    so that its next one could be, too. int64."""
    rows = np.zeros(len(merged.key_ids_Bb), bool)
    for part in parts:
        found = part.key_ids_Bb >= 0
        kinds = [(found, asked.joint)]
        if asked.joint is None:
            kinds = [(found & ~part.is_label_Bb, asked.instances), (found & part.is_label_Bb, asked.labels)]
        for of_kind, limit in kinds:
            full = np.flatnonzero(of_kind.sum(axis=1) == limit) if limit else np.empty(0, np.int64)
            if len(full):
                last = of_kind.shape[1] - 1 - np.argmax(of_kind[full, ::-1], axis=1)
                rows[full] |= (merged.key_ids_Bb[full] == part.key_ids_Bb[full, last, None]).any(axis=1)
    return np.flatnonzero(rows)


def search_all(ask: Callable[[Any, Neighbours], Sequence[Hits]], neighbours: Neighbours, shards: int) -> Hits:
    """The memory's best keys: what all shards have of them, merged; asked again where that was too few.

    ask: (rows of the queries, how many keys) to what each shard found for them.
    """
    asked = asked_of_a_shard(neighbours, shards)
    parts = ask(slice(None), asked)
    hits = merge_hits(parts, neighbours)
    rows = unsettled(parts, hits, asked) if asked != neighbours else ()
    return hits.with_rows(np.asarray(rows), merge_hits(ask(rows, neighbours), neighbours)) if len(rows) else hits


def merge_hits(parts: Sequence[Hits], neighbours: Neighbours) -> Hits:
    """The hits of one memory from those of its shards (or other disjoint parts) for the same queries.

    The result has `joint` columns, or `instances + labels`, whatever the number of parts.
    """
    snapshots = {part.snapshot for part in parts}
    if len(snapshots) != 1:
        raise SnapshotMismatchError(f"answers of {len(snapshots)} snapshots met: {sorted(snapshots)}")
    key_ids = np.concatenate([part.key_ids_Bb for part in parts], axis=1)
    scores = np.concatenate([part.scores_Bb for part in parts], axis=1)
    is_label = np.concatenate([part.is_label_Bb for part in parts], axis=1)
    found = key_ids >= 0
    if neighbours.joint is not None:
        width, best = neighbours.joint, best_cells(scores, key_ids, found, neighbours.joint)
    else:
        instances, labels = neighbours.instances or 0, neighbours.labels or 0
        width = instances + labels
        apart = [best_cells(scores, key_ids, found & ~is_label, instances)]
        apart.append(best_cells(scores, key_ids, found & is_label, labels))
        best = np.sort(np.concatenate(apart))
    B, W = key_ids.shape
    keys_Bb, scores_Bb = np.full((B, width), np.iinfo(np.int64).max), np.full((B, width), -np.inf, np.float32)
    cells_Bb, lengths_Bb = np.full((B, width), -1, np.int64), np.zeros((B, width), np.int64)
    row = best // max(1, W)
    place = row, rank_in_row(row)
    cells_Bb[place], keys_Bb[place], scores_Bb[place] = best, key_ids.ravel()[best], scores.ravel()[best]
    order_Bb = np.lexsort((keys_Bb, -scores_Bb))  # row by row: what is missing comes last
    cells_Bb, keys_Bb, scores_Bb = (np.take_along_axis(a, order_Bb, 1) for a in (cells_Bb, keys_Bb, scores_Bb))
    there_Bb = cells_Bb >= 0
    keys_Bb[~there_Bb] = -1
    is_label_Bb = np.zeros((B, width), bool)
    is_label_Bb[there_Bb] = is_label.ravel()[cells_Bb[there_Bb]]
    votes, lengths_Bb[there_Bb] = _votes_of(parts, *np.divmod(cells_Bb[there_Bb], max(1, W)))
    offsets = np.concatenate([[0], np.cumsum(lengths_Bb)])
    return Hits(keys_Bb, scores_Bb, is_label_Bb, votes, offsets, parts[0].snapshot)


def best_cells(scores: np.ndarray, ids: np.ndarray, valid: np.ndarray, limit: int) -> np.ndarray:
    """Flat places, row by row and in no order within a row, of the best `limit` valid cells of each row of [B, W]
    arrays: by (cosine descending, id ascending). Sorted are only the cells that a partition leaves in question."""
    B, W = scores.shape
    if not limit or not W:
        return np.empty(0, np.int64)
    if limit < W:
        # Below any cosine, and each its own: a partition of many equal numbers takes ten times as long.
        parted = np.where(valid, scores, np.float32(-2) - np.arange(W, dtype=np.float32))
        parted.partition(W - limit, axis=1)
        valid = valid & (scores >= parted[:, W - limit, None])
    cells = np.flatnonzero(valid)
    counts = np.bincount(cells // W, minlength=B)
    crowded = np.flatnonzero(counts > limit)  # rows in which several cells tie for the last place
    if not len(crowded):
        return cells
    row = cells // W
    in_question = np.isin(row, crowded)
    questioned, row = cells[in_question], row[in_question]
    order = np.lexsort((ids.ravel()[questioned], -scores.ravel()[questioned], row))
    rank = rank_in_row(row)  # `row` is sorted, and the same in this order
    return np.sort(np.concatenate([cells[~in_question], questioned[order][rank < limit]]))


def _votes_of(parts: Sequence[Hits], row: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(votes of the hits at these places of the parts side by side, one after the other, and their numbers)."""
    first_vote = np.cumsum([0] + [len(part.votes) for part in parts[:-1]])
    width = [part.key_ids_Bb.shape[1] for part in parts]
    first_cell = np.cumsum([0, *width])
    starts, lengths = np.empty(len(row), np.int64), np.empty(len(row), np.int64)
    of_part = np.searchsorted(first_cell, cell, side="right") - 1
    for i, part in enumerate(parts):
        mine = np.flatnonzero(of_part == i)
        places = row[mine] * width[i] + cell[mine] - first_cell[i]
        starts[mine] = part.vote_offsets[places] + first_vote[i]
        lengths[mine] = part.vote_offsets[places + 1] - part.vote_offsets[places]
    votes = np.concatenate([part.votes for part in parts]) if len(parts) > 1 else parts[0].votes
    return np.take(votes, ragged_places(starts, lengths), mode="clip"), lengths
