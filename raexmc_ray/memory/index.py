"""The index of a shard: FAISS finds the candidates, and their scores are made exact.

A score is the inner product in float64, rounded once to float32. FAISS's own float32 scores differ by up to
5e-7 with the size of a batch, and it returns equal scores in no particular order; with exact scores the order
(score descending, position ascending) is the same whatever the batch and however the keys are sharded.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import torch

SLACK = 16
"""Candidates beyond b in the first search; enough that the exact order of the best b is nearly always settled."""
RESCORE_BYTES = 4 << 20
"""Keys in float64 held at once while scores are made exact: about a core's cache."""


class FlatIndex:
    """Every key is compared with every query: the exact reference."""

    def __init__(self, index: faiss.IndexFlat) -> None:
        self._index = index
        self.dimension: int = index.d
        if len(self):
            flat = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
            flat = flat.view()
            flat.flags.writeable = False
            self._keys_ND = flat.reshape(index.ntotal, index.d)
        else:
            self._keys_ND = np.empty((0, index.d), np.float32)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def build(cls, keys_ND: np.ndarray) -> FlatIndex:
        """Index keys: float32 [N, d], finite, of unit length (the error bound of `search` rests on that)."""
        check_unit_rows(keys_ND, "keys")
        index = faiss.IndexFlatIP(keys_ND.shape[1])
        index.add(np.ascontiguousarray(keys_ND))
        return cls(index)

    @classmethod
    def read(cls, path: Path) -> FlatIndex:
        """Open by memory map: at once, its pages shared by all processes of the machine, and read-only."""
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if not isinstance(index, faiss.IndexFlat):
            raise ValueError(f"{path}: expected a flat index, found {type(index).__name__}")
        return cls(index)

    def write(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))

    def search(self, queries_BD: np.ndarray, b: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The best b of the keys at positions start..stop-1 for each query.

        queries_BD: float32, of unit length. Returns (positions_Bb int64, scores_Bb float32) in the order
        (score descending, position ascending), with b cut to the number of keys there are.
        """
        check_unit_rows(queries_BD, "queries")
        B, keys = len(queries_BD), stop - start
        b = min(b, keys)
        positions_Bb = np.empty((B, b), np.int64)
        scores_Bb = np.empty((B, b), np.float32)
        if b == 0:
            return positions_Bb, scores_Bb
        # |float32 inner product − exact| ≤ d·2⁻²⁴·‖q‖‖k‖, and as much again to be generous
        error = 2 * self.dimension * 2.0**-24
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorRange(start, stop))  # type: ignore[call-arg]
        width, open_rows = min(b + SLACK, keys), np.arange(B)
        while len(open_rows):
            queries = queries_BD[open_rows]
            coarse, found = self._index.search(queries, width, params=parameters)
            exact = self._exact_scores(queries, found)
            order = np.lexsort((found, -exact))[:, :b]
            best = np.take_along_axis(exact, order, 1)
            # A key that was not found scores at most `coarse[:, -1] + error`: it can neither beat nor tie.
            settled = (width == keys) | (coarse[:, -1] + error < best[:, -1])
            rows = open_rows[settled]
            positions_Bb[rows] = np.take_along_axis(found, order, 1)[settled]
            scores_Bb[rows] = best[settled]
            open_rows, width = open_rows[~settled], min(4 * width, keys)
        return positions_Bb, scores_Bb

    def _exact_scores(self, queries_BD: np.ndarray, positions_Bw: np.ndarray) -> np.ndarray:
        """float32 [B, w]: inner products in float64, rounded once."""
        scores = np.empty(positions_Bw.shape, np.float32)
        step = max(1, RESCORE_BYTES // (positions_Bw.shape[1] * self.dimension * 8))
        for first in range(0, len(queries_BD), step):
            part = slice(first, first + step)
            keys = torch.from_numpy(self._keys_ND[positions_Bw[part]]).double()
            queries = torch.from_numpy(queries_BD[part]).double()
            scores[part] = torch.bmm(keys, queries.unsqueeze(2)).squeeze(2).numpy()
        return scores


def check_unit_rows(rows_ND: np.ndarray, what: str) -> None:
    """Raise ValueError unless `rows_ND` is float32 [N, d] with finite rows of unit length."""
    if rows_ND.ndim != 2 or rows_ND.dtype != np.float32:
        raise ValueError(f"{what} must be float32 [rows, d]; found {rows_ND.dtype} {rows_ND.shape}")
    squares = np.einsum("nd,nd->n", rows_ND, rows_ND)
    wrong = ~(np.abs(squares - 1) < 1e-3)  # NaN is wrong too
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{what} must be of unit length: row {row} has length {squares[row] ** 0.5:.4g}")
