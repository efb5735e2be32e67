"""Rows of different lengths as flat arrays: `values` [total] and `offsets` [rows + 1]."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class RaggedRows:
    """Rows that are taken by the thousand: each is copied whole, as one of Arrow's binaries, which takes a sixth of
    the time of `ragged_take`, where every value is looked up by itself."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        """offsets: int64. The values are not copied."""
        self._dtype = values.dtype
        in_bytes = pa.py_buffer(offsets * values.itemsize)
        buffers = [None, in_bytes, pa.py_buffer(values)]
        self._rows = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values, int64 offsets) of these rows, int64, in this order."""
        # Not `pa.array`: it imports pandas, a third of a second in which a restarted shard does not answer.
        places = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])
        _, in_bytes, values = self._rows.take(places).buffers()
        offsets = np.frombuffer(in_bytes, np.int64, len(rows) + 1) // self._dtype.itemsize
        return np.frombuffer(values, self._dtype, offsets[-1]), offsets


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
