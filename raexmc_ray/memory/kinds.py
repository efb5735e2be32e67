"""The kinds of index that a shard may have: what each needs, how it is trained, and how it is filled.

    flat        every key, float32: the exact reference
    flat-fp16   every key, float16: half the bytes
    flat-sq8    every key, a byte a number
    ivf-fp16    keys in inverted lists by a coarse quantiser, float16; a query looks into the nearest lists only
    ivf-pq      the same with 4-bit product codes, and the best of them rescored from float16 keys
    hnsw        a graph of neighbours over float16 keys, one for each shard
    factory:S   whatever FAISS's index factory makes of S

All but hnsw see the same keys whatever the number of shards: what is trained (quantiser, codebooks) is trained
once on a sample of the whole memory, and shared. `index.py` searches them.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict

from raexmc_ray.memory.order import best_columns
from raexmc_ray.recipe import MemorySection

_faiss: Any = faiss
"""For its classes whose constructors are made in Python, which no type checker sees."""
faiss.cvar.distance_compute_blas_threshold = 2048
"""From so many numbers of queries on FAISS searches flat keys, and centroids, by a matrix product. Its own threshold,
128,000, is 334 queries of 384 numbers: up to there each query reads all keys for itself, and a batch of 8 takes twice
the time, one of 32 to 256 four times."""
FACTORY = "factory:"
INDEX, VECTORS, POSITIONS = "index.faiss", "vectors.npy", "positions.npy"
SEED = 0
SAMPLE_PER_LIST, SAMPLE_LEAST = 64, 16384
"""Keys that a quantiser is trained on: so many for each list, and so many at least."""
LEAST_TRAINED_ON = 256
"""Keys that FAISS is given at least, some of them more than once: as many as a code of a byte has values."""
KMEANS_ROUNDS = 10
GRAPH_LINKS = 32
"""Links of a key in an hnsw graph (M)."""
SEARCHED_WHOLE = (
    faiss.IndexPQ,
    faiss.IndexFastScan,
    faiss.IndexAdditiveQuantizer,
    faiss.IndexIVFAdditiveQuantizer,
    faiss.IndexNSG,
)
"""Indexes of a factory string that FAISS cannot search for some of their keys only: known before they are trained."""


class IndexSpec(BaseModel):
    """A kind of index with its sizes settled."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    kind: str
    """flat, flat-fp16, flat-sq8, ivf-fp16, ivf-pq, hnsw, or factory:STRING."""
    dimension: int
    """d: numbers in a key."""
    lists: int = 0
    """Inverted lists of the coarse quantiser that all shards share; 0 where the kind has none. (Of a factory string,
    where nothing is put around them and a query is compared with every list; else each shard finds its own.)"""
    probes: int = 0
    """Lists that a query looks into, those of a factory string too (of an hnsw graph: keys on its search front)."""

    @classmethod
    def of(cls, section: MemorySection, keys: int, dimension: int) -> Self:
        """What a recipe's section asks for, at this number of keys: about 2√keys lists unless they are given, and
        1 in 32 of them probed, but 32 at least. Raises ValueError for a factory string that FAISS does not know or
        cannot search for some keys only, or with more inverted lists than keys, and for probes where it has none."""
        kind = section.index

        def probes(lists: int) -> int:
            return min(section.probes or max(32, lists // 32), lists)

        if kind.startswith("ivf"):
            lists = section.lists or 2 ** round(math.log2(max(1.0, 2 * math.sqrt(keys))))
            lists = min(lists, max(1, keys))
            return cls(kind=kind, dimension=dimension, lists=lists, probes=probes(lists))
        if kind.startswith(FACTORY):
            index = _from_factory(kind, dimension)
            if isinstance(_innermost(index), SEARCHED_WHOLE):
                raise ValueError(_cannot_select(kind, "its search takes no selector"))
            inverted = _faiss.try_extract_index_ivf(index)  # a part of `index`
            if inverted is None and section.probes:
                raise ValueError(f"memory.probes is {section.probes}, and {kind} has no inverted lists: leave it out")
            if inverted is None:
                return cls(kind=kind, dimension=dimension)
            if inverted.nlist > max(keys, LEAST_TRAINED_ON):
                raise ValueError(
                    f"memory.index is {kind!r}: {inverted.nlist:,} inverted lists are more than the {keys:,} keys, "
                    f"and FAISS cannot train them: take {keys:,} at most"
                )
            bare = isinstance(faiss.downcast_index(index), faiss.IndexIVF)
            shared = bare and isinstance(faiss.downcast_index(inverted.quantizer), faiss.IndexFlat)
            lists = inverted.nlist if shared else 0
            return cls(kind=kind, dimension=dimension, lists=lists, probes=probes(inverted.nlist))
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
    def files(self) -> tuple[str, ...]:
        """Names of the files of a shard that `build_index` writes."""
        return (INDEX, VECTORS, POSITIONS) if self.has_vectors else (INDEX,)

    @property
    def stores_float32(self) -> bool:
        """Whether embeddings must reach the index in float32; else half the bytes do."""
        return self.kind == "flat" or self.kind.startswith(FACTORY)


def train_index(spec: IndexSpec, sample_ND: np.ndarray) -> Any:
    """An empty FAISS index of this kind, trained on a sample of the whole memory: float32 [n, d], of unit length.

    From a fixed seed, so that the same sample gives the same index. Raises ValueError for a factory string whose index
    cannot be trained on it, or searched for some of its keys.
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
        try:
            index.train(_enough(sample_ND, LEAST_TRAINED_ON))
        except RuntimeError as error:
            raise ValueError(
                f"memory.index is {spec.kind!r}: FAISS cannot train it on {len(sample_ND):,} keys of {d} numbers: "
                f"{_reason(error)}: take another index"
            ) from None
    if spec.kind.startswith(FACTORY):
        _refuse_without_ranges(index, spec.kind)
    return index


def _refuse_without_ranges(index: Any, kind: str) -> None:
    """Raise ValueError where FAISS cannot search some keys of an index alone; but for the classes in SEARCHED_WHOLE it
    must be trained to find out."""
    try:
        index.search(np.eye(1, index.d, dtype=np.float32), 1, params=selecting(index, {"sel": faiss.IDSelectorAll()}))
    except RuntimeError as error:
        raise ValueError(_cannot_select(kind, _reason(error))) from None


def _cannot_select(kind: str, reason: str) -> str:
    return (
        f"memory.index is {kind!r}: FAISS cannot search it for instances or labels alone ({reason}): "
        "take one of IVF…, Flat, SQ… or HNSW…, alone or with OPQ…, PCA… or RFlat around it"
    )


def _innermost(index: Any) -> Any:
    """What a factory string's other parts (OPQ…, PCA…, RFlat …) are put around."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _innermost(index.base_index)
    return _innermost(index.index) if isinstance(index, faiss.IndexPreTransform) else index


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


def nearest_lists(
    quantizer: Any, vectors_BD: np.ndarray, probes: int, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The inverted lists nearest to each vector: int64 [B, probes], the same ones whatever else is in the batch, and
    the inner products with their centroids, float32, best first.

    quantizer: a flat index of the centroids. width: candidates in the first search. FAISS's float32 scores differ
    between batches by up to d·2⁻²⁴, and with them which list is the last that is taken: what lies that close to it is
    compared in float64.
    """
    centroids: Any = faiss.downcast_index(quantizer)
    lists, d = centroids.ntotal, centroids.d
    probes = min(probes, lists)
    width = min(width or probes + 4 + probes // 8, lists)
    vectors = np.ascontiguousarray(vectors_BD)
    scores_Bw, lists_Bw = centroids.search(vectors, width)
    last_B1, in_doubt = scores_Bw[:, probes - 1, None], np.float32(4 * d * 2.0**-24)
    rows, columns = np.nonzero(np.abs(scores_Bw - last_B1) <= in_doubt)
    open_rows = np.flatnonzero(scores_Bw[:, -1] >= last_B1[:, 0] - in_doubt) if width < lists else ()
    near = faiss.rev_swig_ptr(centroids.get_xb(), lists * d).reshape(lists, d)[lists_Bw[rows, columns]]
    scores_Bw[rows, columns] = np.einsum("nd,nd->n", vectors[rows], near, dtype=np.float64)
    best = best_columns(scores_Bw, lists_Bw, probes)
    lists_Bp, scores_Bp = (np.take_along_axis(array, best, 1) for array in (lists_Bw, scores_Bw))
    if len(open_rows):  # more lists than were looked at lie as close
        lists_Bp[open_rows], scores_Bp[open_rows] = nearest_lists(quantizer, vectors[open_rows], probes, 4 * width)
    return lists_Bp, scores_Bp


def _enough(sample_ND: np.ndarray, least: int) -> np.ndarray:
    """The sample, repeated where a small memory has fewer keys than FAISS wants to see."""
    return np.resize(sample_ND, (least, sample_ND.shape[1])) if len(sample_ND) < least else sample_ND


def build_index(folder: Path, trained: Any, spec: IndexSpec, rows: int, blocks: Callable[[], Iterable[Any]]) -> None:
    """Write the index of `rows` keys into `folder`, in little more memory than it has itself.

    trained: from `train_index`; it is filled. blocks: gives the keys in the order of their positions, float16 or
    float32 [n, d] a block; it is called once, or twice for inverted lists. Of `ivf-fp16` the sizes are counted before
    they are filled, because lists that grow take up to twice the memory; of `ivf-pq` the keys to rescore with are
    written in the order of the lists. Raises OSError, which names the file that the disk has no room for.
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
            lists_N[start : start + len(block_ND)] = nearest_lists(index.quantizer, block_ND, 1)[0][:, 0]
        for number, size in enumerate(np.bincount(lists_N, minlength=index.nlist).tolist()):
            index.invlists.resize(number, size)
            index.invlists.resize(number, 0)  # what was reserved stays
        for start, block_ND in _float_blocks(blocks()):
            ids = np.arange(start, start + len(block_ND))
            lists = lists_N[start : start + len(block_ND)]
            index.add_core(len(ids), *(faiss.swig_ptr(array) for array in (block_ND, ids, lists)))
    else:
        for _, block_ND in _float_blocks(blocks()):
            index.add(block_ND)
        if spec.has_vectors:
            _write_vectors(folder, index.invlists, (rows, spec.dimension), blocks())
    # Through Python's file: of FAISS's own nobody hears where its last bytes find no room.
    with _naming(folder / INDEX), (folder / INDEX).open("wb") as file:
        faiss.write_index(index, _faiss.PyCallbackIOWriter(file.write))


def _write_vectors(folder: Path, lists: Any, shape: tuple[int, int], blocks: Iterable[np.ndarray]) -> None:
    """Write float16 keys [N, d] in the order in which they lie in the inverted lists, and int32 [N] their positions.

    What a query rescores is in a few of the lists, and so in a few places of the file: read from all over it, 110 keys
    of 768 numbers for each of 256 queries take 1.3 times as long.
    """
    sizes = [lists.list_size(number) for number in range(lists.nlist)]
    ids = [faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in enumerate(sizes) if size]
    positions_N = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int32)
    np.save(folder / POSITIONS, positions_N)
    places_N, start = inverse(positions_N), 0
    with _naming(folder / VECTORS):
        vectors_ND = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float16, shape)
        _reserve(folder / VECTORS)
    for block_ND in blocks:
        vectors_ND[places_N[start : start + len(block_ND)]] = block_ND
        start += len(block_ND)
    vectors_ND.flush()


def _reserve(path: Path) -> None:
    """Have the disk keep room for all of a file with holes: where there is none for a page that is mapped, the kernel
    kills the process. Raises OSError."""
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a filesystem that cannot
                raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an OSError, which tells of an open file only what is wrong with it, name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def inverse(permutation_N: np.ndarray) -> np.ndarray:
    """int32 [N]: where each of 0..N-1 stands in the permutation."""
    places_N = np.empty(len(permutation_N), np.int32)
    places_N[permutation_N] = np.arange(len(permutation_N), dtype=np.int32)
    return places_N


def _float_blocks(blocks: Iterable[np.ndarray]) -> Iterable[tuple[int, np.ndarray]]:
    """(position of its first key, the block in float32, checked)."""
    start = 0
    for block_ND in blocks:
        block = np.ascontiguousarray(block_ND, np.float32)
        check_unit_rows(block, "keys", start)
        yield start, block
        start += len(block)


def selecting(index: Any, select: dict[str, Any]) -> Any:
    """Parameters for a search of some keys; those of an index that a factory string puts around another hold its."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        inner = selecting(index.base_index, select)
        return _faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        return selecting(index.index, select)  # it hands them on
    if isinstance(index, faiss.IndexIVF):
        return _faiss.SearchParametersIVF(nprobe=index.nprobe, **select)
    return _faiss.SearchParameters(**select)


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
    return str(error).rpartition(": ")[2].strip()
