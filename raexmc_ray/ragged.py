"""Rows of different lengths as flat arrays: `values` [total] and `offsets` [rows + 1]."""

from __future__ import annotations

import numpy as np


def ragged_take(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, int64 offsets) of these rows, in this order, without a loop over them."""
    lengths = np.diff(offsets)[rows]
    taken = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions = np.repeat(offsets[rows] - taken[:-1], lengths) + np.arange(taken[-1])
    return values[positions], taken
