"""Rows of different lengths as flat arrays: `values` [total] and `offsets` [rows + 1]."""

from __future__ import annotations

import numpy as np


def ragged_take(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, int64 offsets) of these rows, in this order, without a loop over them."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    return values[ragged_places(starts, lengths)], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def longest(offsets: np.ndarray) -> int:
    """Values of the longest row; 0 where there is none."""
    return int(np.diff(offsets).max(initial=0))


def rank_in_row(rows: np.ndarray) -> np.ndarray:
    """int64: 0, 1, 2 … within each run of equal numbers of `rows`, which is sorted."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def ragged_places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: starts[0] … starts[0] + lengths[0] − 1, then those of the next row, and so on."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
