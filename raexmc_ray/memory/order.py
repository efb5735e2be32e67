"""The order of what a search finds, everywhere: score descending, id ascending."""

from __future__ import annotations

import numpy as np


def best_columns(scores_BW: np.ndarray, ids_BW: np.ndarray, b: int) -> np.ndarray:
    """int64 [B, min(b, W)]: the columns of the best b of each row by (score descending, id ascending), those with a
    score of −∞ last. scores_BW: float32, no NaN. ids_BW: integers.

    A score and its column are sorted as one number; the ids are looked at in the rows in which scores tie.
    """
    bits = (scores_BW + np.float32(0)).view(np.uint32)  # −0.0 is 0.0
    # Of floats, as they are in memory, the positive ones ascend as numbers do, and the negative ones descend.
    descending = bits ^ np.where(bits >> 31, np.uint32(0), np.uint32(0x7FFFFFFF))
    packed = descending.astype(np.uint64) << np.uint64(32) | np.arange(scores_BW.shape[1], dtype=np.uint64)
    packed.sort(axis=1)
    columns = (packed[:, :b] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    first = packed[:, : b + 1] >> np.uint64(32)  # a tie with the first that is left out is one, too
    tied = (first[:, 1:] == first[:, :-1]) & (first[:, :-1] != _NOTHING)
    rows = np.flatnonzero(tied.any(axis=1))
    if len(rows):
        columns[rows] = np.lexsort((ids_BW[rows], -scores_BW[rows]))[:, :b]
    return columns


_NOTHING = int(np.float32(-np.inf).view(np.uint32))
"""What stands for −∞ there."""
