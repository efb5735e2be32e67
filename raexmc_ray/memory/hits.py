"""What a search finds, and how the answers of shards become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raexmc_ray.memory.order import best_columns
from raexmc_ray.ragged import RaggedRows
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
        key_ids, scores, is_label = self.key_ids_Bb.copy(), self.scores_Bb.copy(), self.is_label_Bb.copy()
        key_ids[rows], scores[rows], is_label[rows] = other.key_ids_Bb, other.scores_Bb, other.is_label_Bb
        all_votes, (places_Bb, others_Bb) = _votes_of([self, other])
        places_Bb[rows] = others_Bb
        votes, offsets = all_votes.take(places_Bb.ravel())
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
    if neighbours.joint is not None:
        width = neighbours.joint
        columns = best_columns(scores, key_ids, width)
        scores_Bn = np.take_along_axis(scores, columns, 1)
    else:
        instances, labels = neighbours.instances or 0, neighbours.labels or 0
        width = instances + labels
        apart = []
        for of_kind, limit in ((~is_label, instances), (is_label, labels)):
            of_kind_scores = np.where(of_kind, scores, np.float32(-np.inf))
            best = best_columns(of_kind_scores, key_ids, limit)
            apart.append((best, np.take_along_axis(of_kind_scores, best, 1)))
        columns, scores_Bn = (np.concatenate(arrays, axis=1) for arrays in zip(*apart, strict=True))
        order = best_columns(scores_Bn, np.take_along_axis(key_ids, columns, 1), width)
        columns, scores_Bn = np.take_along_axis(columns, order, 1), np.take_along_axis(scores_Bn, order, 1)
    B, n = scores_Bn.shape
    found = scores_Bn > -np.inf
    keys_Bb, scores_Bb = np.full((B, width), -1, np.int64), np.full((B, width), -np.inf, np.float32)
    is_label_Bb = np.zeros((B, width), bool)
    scores_Bb[:, :n] = scores_Bn
    keys_Bb[:, :n] = np.where(found, np.take_along_axis(key_ids, columns, 1), -1)
    is_label_Bb[:, :n] = np.take_along_axis(is_label, columns, 1) & found
    all_votes, places = _votes_of(parts)
    places_Bb = np.full((B, width), NO_VOTES)
    places_Bb[:, :n] = np.where(found, np.take_along_axis(np.concatenate(places, axis=1), columns, 1), NO_VOTES)
    votes, offsets = all_votes.take(places_Bb.ravel())
    return Hits(keys_Bb, scores_Bb, is_label_Bb, votes, offsets, parts[0].snapshot)


NO_VOTES = 0
"""The place of a row without votes among those of `_votes_of`."""


def _votes_of(parts: Sequence[Hits]) -> tuple[RaggedRows, list[np.ndarray]]:
    """The votes of all hits of all parts, a row each after the one without votes, and int64 [B, columns] of each part:
    where its hits' rows are."""
    offsets, places, votes, hits = [np.zeros(2, np.int64)], [], 0, NO_VOTES + 1
    for part in parts:
        offsets.append(part.vote_offsets[1:] + votes)
        places.append(np.arange(hits, hits + part.key_ids_Bb.size).reshape(part.key_ids_Bb.shape))
        votes, hits = votes + len(part.votes), hits + part.key_ids_Bb.size
    all_votes = np.concatenate([part.votes for part in parts]) if len(parts) > 1 else parts[0].votes
    return RaggedRows(all_votes, np.concatenate(offsets)), places
