"""The index of a shard: one small interface over FAISS, exact to the last tie where the kind allows it.

    flat        every key, float32: the exact reference
    flat-fp16   every key, float16: half the bytes
    flat-sq8    every key, a byte a number
    ivf-fp16    keys in inverted lists by a coarse quantiser, float16; a query looks into the nearest lists only
    ivf-pq      the same with 4-bit product codes, and the best of them rescored from float16 keys
    hnsw        a graph of neighbours over float16 keys, one for each shard
    factory:S   whatever FAISS's index factory makes of S

All but hnsw see the same keys whatever the number of shards: what is trained (quantiser, codebooks) is trained
once on a sample of the whole memory, and shared. Scores are inner products of the query with a key as it is
stored, and do not change with the batch: a flat index's are made so (float64, rounded once), because FAISS's own
float32 scores differ by up to 5e-7 between batch sizes; the others' are so by themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from raexmc_ray.recipe import MemorySection

_faiss: Any = faiss
"""For its classes whose constructors are made in Python, which no type checker sees."""
FACTORY = "factory:"
INDEX, VECTORS = "index.faiss", "vectors.npy"
SEED = 0
SLACK = 16
"""Candidates beyond b in the first search; enough that the exact order of the best b is nearly always settled."""
RESCORE_BYTES = 3 << 18
"""Keys held at once, widened, while scores are made exact: with what they are widened from, a core's cache."""
FEW_NUMBERS = 1 << 20
"""Numbers of float16 keys up to which NumPy converts them before torch is there: a restarted shard's first answers do
not wait a second for it."""
REFINED = 6
"""Keys of `ivf-pq` that are rescored for each one that is wanted."""
SAMPLE_PER_LIST, SAMPLE_LEAST = 64, 16384
"""Keys that a quantiser is trained on: so many for each list, and so many at least."""
KMEANS_ROUNDS = 10
GPU_KINDS = ("flat", "flat-fp16", "ivf-fp16")
GPU_WIDTH = 2048
"""The most candidates that FAISS finds on a GPU; it also has no ranges of keys there. The CPU does the rest."""
GRAPH_LINKS = 32
"""Links of a key in an hnsw graph (M)."""


class IndexSpec(BaseModel):
    """A kind of index with its sizes settled."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    kind: str
    """flat, flat-fp16, flat-sq8, ivf-fp16, ivf-pq, hnsw, or factory:STRING."""
    dimension: int
    """d: numbers in a key."""
    lists: int = 0
    """Inverted lists of the coarse quantiser; 0 where the kind has none."""
    probes: int = 0
    """Lists that a query looks into, those of a factory string too (of an hnsw graph: keys on its search front)."""

    @classmethod
    def of(cls, section: MemorySection, keys: int, dimension: int) -> Self:
        """What a recipe's section asks for, at this number of keys: about 2√keys lists unless they are given, and
        1 in 32 of them probed, but 32 at least. Raises ValueError for a factory string that FAISS does not know, and
        for probes where it has no inverted lists."""
        kind = section.index

        def probes(lists: int) -> int:
            return min(section.probes or max(32, lists // 32), lists)

        if kind.startswith("ivf"):
            lists = section.lists or 2 ** round(math.log2(max(1.0, 2 * math.sqrt(keys))))
            lists = min(lists, max(1, keys))
            return cls(kind=kind, dimension=dimension, lists=lists, probes=probes(lists))
        if kind.startswith(FACTORY):
            index = _from_factory(kind, dimension)
            inverted = _faiss.try_extract_index_ivf(index)  # a part of `index`
            if inverted is None and section.probes:
                raise ValueError(f"memory.probes is {section.probes}, and {kind} has no inverted lists: leave it out")
            return cls(kind=kind, dimension=dimension, probes=probes(inverted.nlist) if inverted else 0)
        return cls(kind=kind, dimension=dimension, probes=section.probes or (128 if kind == "hnsw" else 0))

    @property
    def sample(self) -> int:
        """Keys to train on; 0 where there is nothing to train."""
        if self.kind in ("flat", "flat-fp16", "hnsw"):
            return 0
        lists = self.lists
        if self.kind.startswith(FACTORY):
            inverted = _faiss.try_extract_index_ivf(_from_factory(self.kind, self.dimension))
            lists = inverted.nlist if inverted else 0
        return max(SAMPLE_PER_LIST * lists, SAMPLE_LEAST)

    @property
    def subvectors(self) -> int:
        """Parts of a key that `ivf-pq` codes with four bits each: of eight numbers, where d can be so divided."""
        wanted = max(1, self.dimension // 8)
        return next(parts for parts in range(wanted, 0, -1) if self.dimension % parts == 0)

    @property
    def has_vectors(self) -> bool:
        """Whether a shard keeps its keys a second time, to rescore with."""
        return self.kind == "ivf-pq"

    @property
    def stores_float32(self) -> bool:
        """Whether embeddings must reach the index in float32; else half the bytes do."""
        return self.kind == "flat" or self.kind.startswith(FACTORY)


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


def train_index(spec: IndexSpec, sample_ND: np.ndarray) -> Any:
    """An empty FAISS index of this kind, trained on a sample of the whole memory: float32 [n, d], of unit length.

    From a fixed seed, so that the same sample gives the same index. Raises ValueError for a factory string whose index
    cannot be searched for some of its keys.
    """
    d, metric = spec.dimension, faiss.METRIC_INNER_PRODUCT
    fp16 = faiss.ScalarQuantizer.QT_fp16
    if spec.kind.startswith(FACTORY):
        index = _from_factory(spec.kind, d)
    elif spec.kind == "flat":
        index = faiss.IndexFlatIP(d)
    elif spec.kind == "flat-fp16":
        index = faiss.IndexScalarQuantizer(d, fp16, metric)
    elif spec.kind == "flat-sq8":
        index = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_8bit, metric)
    elif spec.kind == "hnsw":
        index = _faiss.IndexHNSWSQ(d, fp16, GRAPH_LINKS, metric)
    else:
        index = _inverted_lists(spec, sample_ND)
    if not index.is_trained:
        index.train(_enough(sample_ND, 256))
    if spec.kind.startswith(FACTORY):
        _refuse_without_ranges(index, spec.kind)
    return index


def _refuse_without_ranges(index: Any, kind: str) -> None:
    """Raise ValueError where FAISS cannot search some keys of an index alone; it must be trained to find out."""
    try:
        index.search(np.eye(1, index.d, dtype=np.float32), 1, params=_selecting(index, {"sel": faiss.IDSelectorAll()}))
    except RuntimeError as error:
        raise ValueError(
            f"memory.index is {kind!r}: FAISS cannot search it for instances or labels alone ({_reason(error)}): "
            "take one of IVF…, Flat, SQ… or HNSW…, alone or with OPQ…, PCA… or RFlat around it"
        ) from None


def _from_factory(kind: str, dimension: int) -> Any:
    """An untrained index of a kind `factory:STRING`. Raises ValueError where FAISS does not know the string."""
    try:
        return faiss.index_factory(dimension, kind.removeprefix(FACTORY), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"memory.index is {kind!r}: FAISS cannot make it: {_reason(error)}") from None


def _inverted_lists(spec: IndexSpec, sample_ND: np.ndarray) -> Any:
    d = spec.dimension
    settings = {"niter": KMEANS_ROUNDS, "spherical": True, "seed": SEED, "max_points_per_centroid": 1 << 30}
    means = _faiss.Kmeans(d, spec.lists, **settings)
    means.cp.min_points_per_centroid = 1  # no warning on standard output: we chose
    means.train(_enough(sample_ND, spec.lists))
    quantizer: Any = faiss.IndexFlatIP(d)
    quantizer.add(means.centroids)
    index: Any
    # Keys are stored as they are, not less their centroid: then a key's score does not depend on its list.
    if spec.kind == "ivf-fp16":
        arguments = (faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False)
        index = faiss.IndexIVFScalarQuantizer(quantizer, d, spec.lists, *arguments)
    else:
        index = faiss.IndexIVFPQFastScan(quantizer, d, spec.lists, spec.subvectors, 4, faiss.METRIC_INNER_PRODUCT)
        index.by_residual = False
        index.pq.cp.min_points_per_centroid = 1
    quantizer.this.disown()  # it belongs to the index now
    index.own_fields = True
    return index


def _enough(sample_ND: np.ndarray, least: int) -> np.ndarray:
    """The sample, repeated where a small memory has fewer keys than FAISS wants to see."""
    return np.resize(sample_ND, (least, sample_ND.shape[1])) if len(sample_ND) < least else sample_ND


def build_index(folder: Path, trained: Any, spec: IndexSpec, rows: int, blocks: Callable[[], Iterable[Any]]) -> None:
    """Write the index of `rows` keys into `folder`, in little more memory than it has itself.

    trained: from `train_index`; it is filled. blocks: gives the keys in the order of their positions, float16 or
    float32 [n, d] a block; it is called once, or twice for inverted lists: their sizes are counted before they
    are filled, because lists that grow take up to twice the memory.
    """
    index = trained
    if spec.kind.startswith("flat"):
        index.codes.resize(rows * index.code_size)
        codes = faiss.rev_swig_ptr(index.codes.data(), rows * index.code_size).reshape(rows, index.code_size)
        for start, block_ND in _float_blocks(blocks()):
            codes[start : start + len(block_ND)] = index.sa_encode(block_ND)
        index.ntotal = rows
    elif spec.kind == "ivf-fp16":
        lists_N = np.empty(rows, np.int64)
        for start, block_ND in _float_blocks(blocks()):
            lists_N[start : start + len(block_ND)] = index.quantizer.search(block_ND, 1)[1][:, 0]
        for number, size in enumerate(np.bincount(lists_N, minlength=index.nlist).tolist()):
            index.invlists.resize(number, size)
            index.invlists.resize(number, 0)  # what was reserved stays
        for start, block_ND in _float_blocks(blocks()):
            ids = np.arange(start, start + len(block_ND))
            lists = lists_N[start : start + len(block_ND)]
            index.add_core(len(ids), *(faiss.swig_ptr(array) for array in (block_ND, ids, lists)))
    else:
        vectors = None
        if spec.has_vectors:
            shape = (rows, spec.dimension)
            vectors = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float16, shape)
        for start, block_ND in _float_blocks(blocks()):
            index.add(block_ND)
            if vectors is not None:
                vectors[start : start + len(block_ND)] = block_ND
        if vectors is not None:
            vectors.flush()
    faiss.write_index(index, str(folder / INDEX))


def _float_blocks(blocks: Iterable[np.ndarray]) -> Iterable[tuple[int, np.ndarray]]:
    """(position of its first key, the block in float32, checked)."""
    start = 0
    for block_ND in blocks:
        block = np.ascontiguousarray(block_ND, np.float32)
        check_unit_rows(block, "keys", start)
        yield start, block
        start += len(block)


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


class CoarseQuantizer:
    """Says which inverted lists a query looks into: the same for every shard, so it is asked once."""

    def __init__(self, trained: Any, probes: int) -> None:
        self._index, self._probes = trained, probes

    def assign(self, queries_BD: np.ndarray) -> Lists:
        """The lists nearest to each query: float32 [B, d], of unit length."""
        scores_Bp, lists_Bp = self._index.quantizer.search(np.ascontiguousarray(queries_BD), self._probes)
        return Lists(lists_Bp, scores_Bp)


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
        self.spec, self._shards, self._keys_ND = spec, shards, None
        self._on_gpu = _copy_to_gpu(self._index, spec) if gpu else None
        if spec.has_vectors:
            self._keys_ND = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
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
            scores = coarse if self._keys_ND is None else self._rescored(queries_BD[open_rows], found)
            scores[found < 0] = -np.inf
            positions, best = _best_first(scores, found, b)
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
        return _selecting(self._index, select) if select else None

    def _rescored(self, queries_BD: np.ndarray, positions_Bw: np.ndarray) -> np.ndarray:
        """float32 [B, w]: inner products with the keys kept for it; float64 rounded once where they are float32.

        (That of −1 is of any key; it is sorted out later.)
        """
        assert self._keys_ND is not None
        (B, w), D, kept = positions_Bw.shape, self.spec.dimension, self._keys_ND.dtype
        halves = kept == np.float16
        wide: np.dtype[Any] = np.dtype(np.float32 if halves else np.float64)
        few = positions_Bw.size * D <= FEW_NUMBERS and "torch" not in sys.modules
        widen = _copy_by_torch if halves and not few else _copy
        # As bytes: in FAISS's file the keys are not aligned, and NumPy would copy all of them before it takes some.
        rows_N = self._keys_ND.view(f"V{self._keys_ND.strides[0]}")[:, 0]
        step = max(1, min(B, RESCORE_BYTES // (w * D * wide.itemsize)))
        # The same memory for all steps: the kernel clears fresh memory first, which takes longer than to read the keys.
        taken_sw, keys_swD = np.empty((step, w), rows_N.dtype), np.empty((step, w, D), wide)
        queries_BD1, scores_Bw = queries_BD.astype(wide)[:, :, None], np.empty((B, w), np.float32)
        for first in range(0, B, step):
            n, part = min(step, B - first), slice(first, first + step)
            # With "clip", `take` copies whole rows, four times as fast as an index does.
            np.take(rows_N, positions_Bw[part], mode="clip", out=taken_sw[:n])
            widen(keys_swD[:n], taken_sw[:n].view(kept).reshape(n, w, D))
            scores_Bw[part] = np.matmul(keys_swD[:n], queries_BD1[part])[:, :, 0]
        return scores_Bw


def _selecting(index: Any, select: dict[str, Any]) -> Any:
    """Parameters for a search of some keys; those of an index that a factory string puts around another hold its."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        inner = _selecting(index.base_index, select)
        return _faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        return _selecting(index.index, select)  # it hands them on
    if isinstance(index, faiss.IndexIVF):
        return _faiss.SearchParametersIVF(nprobe=index.nprobe, **select)
    return _faiss.SearchParameters(**select)


def _best_first(scores_Bw: np.ndarray, positions_Bw: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, scores) [B, b]: the best b of each row by (score descending, position ascending), −1 and −∞ last.

    A score (float32) and a position (below 2³²) are one integer, so that a sort of numbers orders both.
    """
    upper = _turned((scores_Bw + np.float32(0)).view(np.uint32)).astype(np.uint64)  # −0.0 is 0.0
    packed_Bw = upper << np.uint64(32) | (positions_Bw & 0xFFFFFFFF).astype(np.uint64)
    packed_Bw.sort(axis=1)
    best_Bb = packed_Bw[:, :b]
    scores_Bb = _turned((best_Bb >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    positions_Bb = (best_Bb & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return np.where(scores_Bb == -np.inf, -1, positions_Bb), scores_Bb


def _turned(bits: np.ndarray) -> np.ndarray:
    """uint32 that ascend as the float32 of these bits descend; and those bits of such numbers."""
    return bits ^ np.where(bits >> 31, np.uint32(0), np.uint32(0x7FFFFFFF))


def _copy(to: np.ndarray, keys: np.ndarray) -> None:
    to[...] = keys


def _copy_by_torch(to: np.ndarray, keys: np.ndarray) -> None:
    import torch  # it converts float16 at six times NumPy's speed; shards of other kinds open without it

    torch.from_numpy(to).copy_(torch.from_numpy(keys))


def use_threads(threads: int) -> None:
    """Give FAISS so many threads in this process: one a CPU that it owns, or it stalls (faiss#2502)."""
    faiss.omp_set_num_threads(threads)


def check_unit_rows(rows_ND: np.ndarray, what: str, first: int = 0) -> None:
    """Raise ValueError unless `rows_ND` is float32 [N, d] with finite rows of unit length; row 0 is called `first`."""
    if rows_ND.ndim != 2 or rows_ND.dtype != np.float32:
        raise ValueError(f"{what} must be float32 [rows, d]; found {rows_ND.dtype} {rows_ND.shape}")
    squares = np.einsum("nd,nd->n", rows_ND, rows_ND)
    wrong = ~(np.abs(squares - 1) < 1e-3)  # NaN is wrong too
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{what} must be of unit length: row {first + row} has length {squares[row] ** 0.5:.4g}")


def _reason(error: RuntimeError) -> str:
    """FAISS's own words, without its source lines."""
    return str(error).rpartition(": ")[2]
