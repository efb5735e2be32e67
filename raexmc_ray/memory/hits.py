"""What a search finds, and how the answers of shards become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raexmc_ray.ragged import ragged_take
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

    def reorder(self, order_Bb: np.ndarray, keep_Bb: np.ndarray) -> Hits:
        """Row-wise, the hits at places `order_Bb`; those that `keep_Bb` does not keep become padding."""
        B, b = self.key_ids_Bb.shape
        if not b:  # there is nothing to take from: all of it is padding
            shape, offsets = order_Bb.shape, np.zeros(order_Bb.size + 1, np.int64)
            nothing = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32), np.zeros(shape, bool)
            return Hits(*nothing, self.votes, offsets, self.snapshot)
        cells = (np.arange(B)[:, None] * b + order_Bb).ravel()
        keep = keep_Bb.ravel()
        lengths = np.diff(self.vote_offsets)
        votes, _ = ragged_take(self.votes, self.vote_offsets, cells[keep])
        offsets = np.concatenate([[0], np.cumsum(np.where(keep, lengths[cells], 0))])
        take = np.take_along_axis
        return Hits(
            np.where(keep_Bb, take(self.key_ids_Bb, order_Bb, 1), -1),
            np.where(keep_Bb, take(self.scores_Bb, order_Bb, 1), np.float32(-np.inf)),
            take(self.is_label_Bb, order_Bb, 1) & keep_Bb,
            votes,
            offsets,
            self.snapshot,
        )


class SnapshotMismatchError(RuntimeError):
    """Shards answered from different snapshots; such answers are never merged."""


def merge_hits(parts: Sequence[Hits], neighbours: Neighbours) -> Hits:
    """The hits of one memory from those of its shards (or other disjoint parts) for the same queries.

    The result has `joint` columns, or `instances + labels`, whatever the number of parts.
    """
    snapshots = {part.snapshot for part in parts}
    if len(snapshots) != 1:
        raise SnapshotMismatchError(f"answers of {len(snapshots)} snapshots met: {sorted(snapshots)}")
    joined = _side_by_side(parts)
    key_ids = np.where(joined.key_ids_Bb < 0, np.iinfo(np.int64).max, joined.key_ids_Bb)
    order = np.lexsort((key_ids, -joined.scores_Bb))
    found = np.take_along_axis(joined.key_ids_Bb, order, 1) >= 0
    if neighbours.joint is not None:
        width = neighbours.joint
        keep = found
    else:
        is_label = np.take_along_axis(joined.is_label_Bb, order, 1)
        limits = ((~is_label, neighbours.instances or 0), (is_label, neighbours.labels or 0))
        keep = np.zeros_like(found)
        for kind, limit in limits:
            keep |= found & kind & (np.cumsum(found & kind, axis=1) <= limit)
        width = sum(limit for _, limit in limits)
        to_front = np.argsort(~keep, axis=1, kind="stable")
        order, keep = np.take_along_axis(order, to_front, 1), np.take_along_axis(keep, to_front, 1)
    short = width - order.shape[1]
    if short > 0:
        order, keep = np.pad(order, ((0, 0), (0, short))), np.pad(keep, ((0, 0), (0, short)))
    return joined.reorder(order[:, :width], keep[:, :width])


def _side_by_side(parts: Sequence[Hits]) -> Hits:
    """All parts' columns next to each other, votes included."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(p.vote_offsets).reshape(p.key_ids_Bb.shape) for p in parts], axis=1).ravel()
    # Votes of all parts in part order; then the row of each part that a cell's votes lie in.
    votes = np.concatenate([p.votes for p in parts])
    first = np.cumsum([0] + [len(p.votes) for p in parts[:-1]])
    starts = np.concatenate(
        [p.vote_offsets[:-1].reshape(p.key_ids_Bb.shape) + base for p, base in zip(parts, first, strict=True)], axis=1
    ).ravel()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Hits(
        np.concatenate([p.key_ids_Bb for p in parts], axis=1),
        np.concatenate([p.scores_Bb for p in parts], axis=1),
        np.concatenate([p.is_label_Bb for p in parts], axis=1),
        votes[positions],
        offsets,
        parts[0].snapshot,
    )
