"""The index of a shard, opened for searching: one small interface over FAISS, exact to the last tie where the kind
allows it (kinds.py).

Scores are inner products of the query with a key as it is stored, and do not change with the batch: a flat index's
are made so (float64, rounded once), because FAISS's own float32 scores differ by up to 5e-7 between batch sizes; the
others' are so by themselves.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from raexmc_ray.memory.kinds import (
    FACTORY,
    INDEX,
    POSITIONS,
    VECTORS,
    IndexSpec,
    check_unit_rows,
    inverse,
    nearest_lists,
    selecting,
)
from raexmc_ray.memory.order import best_columns

_faiss: Any = faiss
"""For its classes whose constructors are made in Python, which no type checker sees."""
SLACK = 16
"""Candidates beyond b in the first search; enough that the exact order of the best b is nearly always settled."""
RESCORE_BYTES = 1 << 21
"""Keys held at once, widened, while scores are made exact: few enough to stay in a core's caches, and enough for the
steps' own work not to count."""
FEW_NUMBERS = 1 << 20
"""Numbers of float16 keys up to which NumPy converts them before torch is there: a restarted shard's first answers do
not wait a second for it."""
REFINED = 6
"""Keys of `ivf-pq` that are rescored for each one that is wanted."""
GPU_KINDS = ("flat", "flat-fp16", "ivf-fp16")
GPU_WIDTH = 2048
"""The most candidates that FAISS finds on a GPU; it also has no ranges of keys there. The CPU does the rest."""


@dataclass(frozen=True)
class Lists:
    """The inverted lists that each query looks into, best first, found once for all shards.

    lists_Bp: int64. scores_Bp: float32, the query's inner products with their centroids.
    """

    lists_Bp: np.ndarray
    scores_Bp: np.ndarray

    def of(self, rows: Any) -> Lists:
        """Those of some of the queries."""
        return Lists(self.lists_Bp[rows], self.scores_Bp[rows])


class CoarseQuantizer:
    """Says which inverted lists a query looks into: the same for every shard, so it is asked once."""

    def __init__(self, trained: Any, probes: int) -> None:
        self._index, self._probes = trained, probes

    def assign(self, queries_BD: np.ndarray) -> Lists:
        """The lists nearest to each query: float32 [B, d], of unit length."""
        return Lists(*nearest_lists(self._index.quantizer, queries_BD, self._probes))


def open_quantizer(path: Path, spec: IndexSpec) -> CoarseQuantizer | None:
    """The quantiser of a trained index, or None where its kind has none."""
    return CoarseQuantizer(faiss.read_index(str(path)), spec.probes) if spec.lists else None


class ShardIndex:
    """The keys of one shard, opened for searching by memory map: at once, pages shared by all processes."""

    def __init__(self, folder: Path, spec: IndexSpec, shards: int, *, gpu: bool = False) -> None:
        """shards: of the whole memory, over which any query's neighbours are spread evenly. gpu: search on this
        process's GPU what can be searched there, which takes a copy of the index in its memory. Raises ValueError
        where there is no GPU, or FAISS was built without."""
        self._index = _faiss.read_index(str(folder / INDEX), faiss.IO_FLAG_MMAP_IFC)
        if self._index.d != spec.dimension:
            raise ValueError(f"{folder / INDEX}: has dimension {self._index.d}, not {spec.dimension}")
        if spec.kind.startswith(FACTORY) and spec.probes:
            _faiss.extract_index_ivf(self._index).nprobe = spec.probes
        self.spec, self._shards, self._keys_ND, self._order = spec, shards, None, None
        self._on_gpu = _copy_to_gpu(self._index, spec) if gpu else None
        if spec.has_vectors:
            self._keys_ND = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            self._order = _Order(np.load(folder / POSITIONS, allow_pickle=False))
        elif spec.kind == "flat" and len(self):
            flat = faiss.rev_swig_ptr(self._index.get_xb(), len(self) * spec.dimension)
            self._keys_ND = flat.view().reshape(len(self), spec.dimension)
            self._keys_ND.flags.writeable = False

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(
        self,
        queries_BD: np.ndarray,
        b: int,
        start: int,
        stop: int,
        lists: Lists | None = None,
        wanted: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best b of the keys at positions start..stop-1 for each query.

        queries_BD: float32, of unit length. lists: from the CoarseQuantizer, for kinds that have one. wanted: of the
        whole memory, b where left out; an approximate index looks at as many keys as that takes. Returns
        (positions_Bb int64, scores_Bb float32) in the order (score descending, position ascending), with b cut to
        the number of keys there are; where lists hold fewer, position −1 and score −∞ stand at a row's end.
        """
        check_unit_rows(queries_BD, "queries")
        B, keys = len(queries_BD), stop - start
        b = min(b, keys)
        positions_Bb = np.full((B, b), -1, np.int64)
        scores_Bb = np.full((B, b), -np.inf, np.float32)
        if b == 0:
            return positions_Bb, scores_Bb
        width, open_rows = min(max(b, self._first_width(b, wanted or b)), keys), np.arange(B)
        while len(open_rows):
            coarse, found = self._candidates(queries_BD[open_rows], width, start, stop, lists, open_rows)
            places = found
            if self._order:
                found, places = self._order.sorted(found)
            scores = coarse if self._keys_ND is None else self._rescored(queries_BD[open_rows], places)
            scores[found < 0] = -np.inf
            columns = best_columns(scores, found, b)
            best = np.take_along_axis(scores, columns, 1)
            positions = np.where(best > -np.inf, np.take_along_axis(found, columns, 1), -1)
            # A key that was not found scores at most `coarse[:, -1] + error`: it can neither beat nor tie.
            settled = (width == keys) | (found[:, -1] < 0) | (coarse[:, -1] + self._error < best[:, -1])
            rows = open_rows[settled]
            positions_Bb[rows, : best.shape[1]] = positions[settled]
            scores_Bb[rows, : best.shape[1]] = best[settled]
            open_rows, width = open_rows[~settled], min(4 * width, keys)
        return positions_Bb, scores_Bb

    @property
    def _error(self) -> float:
        """How far a candidate's score may lie from the final one; −∞ where the search is approximate anyhow, and
        the order at the boundary is not worth a second one."""
        if self.spec.kind == "flat":  # |float32 inner product − exact| ≤ d·2⁻²⁴·‖q‖‖k‖, and as much again
            return 2 * self.spec.dimension * 2.0**-24
        return 0.0 if self.spec.kind in ("flat-fp16", "flat-sq8", "ivf-fp16") else -math.inf

    def _first_width(self, b: int, wanted: int) -> int:
        if self.spec.kind == "hnsw":
            return wanted + SLACK
        if not self.spec.has_vectors:
            return b + SLACK
        # Keys are dealt to shards by id, so that of the REFINED·wanted best of the memory a shard has its share, give
        # or take: four standard deviations beyond it.
        share = REFINED * wanted / self._shards
        return math.ceil(share + 4 * math.sqrt(share)) if self._shards > 1 else REFINED * wanted

    def _candidates(
        self, queries_BD: np.ndarray, width: int, start: int, stop: int, lists: Lists | None, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, positions) [B, width] as FAISS finds them, best first; −1 where lists hold fewer."""
        select = {} if (start, stop) == (0, len(self)) else {"sel": faiss.IDSelectorRange(start, stop)}
        if self._on_gpu is not None and not select and width <= GPU_WIDTH:
            if lists is None:
                return self._on_gpu.search(queries_BD, width)
            return self._on_gpu.search_preassigned(queries_BD, width, lists.lists_Bp[rows], lists.scores_Bp[rows])
        if lists is None:
            return self._index.search(queries_BD, width, params=self._parameters(width, select))
        # The wrapper of search_preassigned takes no selector: the method beneath it does.
        queries = np.ascontiguousarray(queries_BD, np.float32)
        lists_Bp = np.ascontiguousarray(lists.lists_Bp[rows], np.int64)
        centroid_scores_Bp = np.ascontiguousarray(lists.scores_Bp[rows], np.float32)
        parameters = _faiss.SearchParametersIVF(nprobe=lists_Bp.shape[1], **select)
        scores, found = np.empty((len(queries), width), np.float32), np.empty((len(queries), width), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (lists_Bp, centroid_scores_Bp, scores, found)]
        self._index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), width, *pointers, False, parameters)
        return scores, found

    def _parameters(self, width: int, select: dict[str, Any]) -> Any:
        """What FAISS wants to hear beside the queries: each family of indexes has a class of its own for it."""
        if self.spec.kind == "hnsw":
            return _faiss.SearchParametersHNSW(efSearch=max(self.spec.probes, 2 * width), **select)
        return selecting(self._index, select) if select else None

    def _rescored(self, queries_BD: np.ndarray, places_Bw: np.ndarray) -> np.ndarray:
        """float32 [B, w]: inner products with the keys kept at these places; float64 rounded once where they are
        float32.

        (That of a place that there is not is of any key; it is sorted out later.)
        """
        assert self._keys_ND is not None
        (B, w), D, kept = places_Bw.shape, self.spec.dimension, self._keys_ND.dtype
        halves = kept == np.float16
        wide: np.dtype[Any] = np.dtype(np.float32 if halves else np.float64)
        few = places_Bw.size * D <= FEW_NUMBERS and "torch" not in sys.modules
        widen = _copy_by_torch if halves and not few else _copy
        # As bytes: in FAISS's file the keys are not aligned, and NumPy would copy all of them before it takes some.
        rows_N = self._keys_ND.view(f"V{self._keys_ND.strides[0]}")[:, 0]
        step = max(1, min(B, RESCORE_BYTES // (w * D * wide.itemsize)))
        # The same memory for all steps: the kernel clears fresh memory first, which takes longer than to read the keys.
        taken_sw, keys_swD = np.empty((step, w), rows_N.dtype), np.empty((step, w, D), wide)
        queries_BD1, scores_Bw1 = queries_BD.astype(wide)[:, :, None], np.empty((B, w, 1), np.float32)
        for first in range(0, B, step):
            n, part = min(step, B - first), slice(first, first + step)
            # With "clip", `take` copies whole rows, four times as fast as an index does.
            np.take(rows_N, places_Bw[part], mode="clip", out=taken_sw[:n])
            widen(keys_swD[:n], taken_sw[:n].view(kept).reshape(n, w, D))
            np.matmul(keys_swD[:n], queries_BD1[part], out=scores_Bw1[part], casting="same_kind")
        return scores_Bw1[:, :, 0]


class _Order:
    """In which order keys to rescore with lie, where it is not that of their positions."""

    def __init__(self, positions_N: np.ndarray) -> None:
        """positions_N: int32, of the keys as they lie."""
        self._places_N = inverse(positions_N)
        self._positions_N1 = np.append(positions_N, np.int32(-1))

    def sorted(self, positions_Bw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, places), int64 and int32 [B, w]: each row as the keys lie, −1 and N at its end."""
        places_Bw = np.where(positions_Bw < 0, len(self._places_N), self._places_N[positions_Bw])
        places_Bw.sort(axis=1)
        return self._positions_N1[places_Bw].astype(np.int64), places_Bw


def _copy_to_gpu(index: Any, spec: IndexSpec) -> Any:
    """A copy of the index on this process's first GPU. Raises ValueError for the kinds that FAISS has on CPUs only."""
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise ValueError("this process sees no GPU, or FAISS was built without: install the extra [gpu], not [cpu]")
    if spec.kind not in GPU_KINDS:
        raise ValueError(f"{spec.kind} is searched on CPUs only, and this shard owns a GPU: on GPUs are {GPU_KINDS}")
    copied = _faiss.index_cpu_to_gpu(_faiss.StandardGpuResources(), 0, index)
    if spec.lists:
        copied.nprobe = spec.probes
    return copied


def _copy(to: np.ndarray, keys: np.ndarray) -> None:
    to[...] = keys


def _copy_by_torch(to: np.ndarray, keys: np.ndarray) -> None:
    import torch  # it converts float16 at six times NumPy's speed; shards of other kinds open without it

    torch.from_numpy(to).copy_(torch.from_numpy(keys))


def use_threads(threads: int) -> None:
    """Give FAISS so many threads in this process: one a CPU that it owns, or it stalls (faiss#2502)."""
    faiss.omp_set_num_threads(threads)
