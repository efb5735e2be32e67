"""The raw text layout: a text a line (`raw/trn_X.txt`, `raw/tst_X.txt`, `raw/Y.txt`) and the relevance in
SciPy's npz (`Y.trn.npz`, `Y.tst.npz`). A row's uid is its line number, from 0."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from raexmc_ray.corpus.lines import check_text, find, is_there, read_lines, read_pairs
from raexmc_ray.corpus.types import Corpus, CorpusError, Split, pair_matrix, text_table


def read(folder: Path, fields: Sequence[str]) -> Corpus:
    """The corpus in `folder`. Texts are whole lines here, so `fields` does not apply."""
    del fields
    labels = _read_texts(folder / "raw" / "Y.txt")
    train = _read_split(folder, "trn", "train", labels)
    test = (
        _read_split(folder, "tst", "test", labels)
        if is_there(folder / "raw" / "tst_X.txt")
        else train.take(np.arange(0))
    )
    return Corpus(train, test, text_table([str(i) for i in range(len(labels))], labels))


def _read_texts(path: Path) -> list[str]:
    if not is_there(path):
        raise CorpusError(path, "is missing")
    texts = [check_text(path, number, "text", line) for number, line in read_lines(path)]
    if not texts:
        raise CorpusError(path, "there is no text in it")
    return texts


def _read_split(folder: Path, short: str, long: str, labels: list[str]) -> Split:
    texts = _read_texts(folder / "raw" / f"{short}_X.txt")
    shape = (len(texts), len(labels))
    relevance = _read_relevance(folder / f"Y.{short}.npz", shape)
    filtered = pair_matrix(*read_pairs(find(folder, f"filter_labels_{long}.txt"), *shape), shape)
    return Split(text_table([str(i) for i in range(len(texts))], texts), relevance, filtered)


NOT_A_MATRIX = (
    *(ValueError, OSError, KeyError, EOFError, TypeError, AttributeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What SciPy raises of a file that is torn, altered, or something else."""


def _read_relevance(path: Path, shape: tuple[int, int]) -> sp.csr_matrix:
    if not is_there(path):
        raise CorpusError(path, "is missing: it holds the relevance")
    try:
        loaded = sp.load_npz(path)
        matrix = sp.csr_matrix(loaded)
        matrix.check_format(full_check=True)
    except NOT_A_MATRIX as error:
        raise CorpusError(path, f"is not a whole SciPy sparse matrix ({error})") from None
    if matrix.shape != shape:
        raise CorpusError(path, f"has shape {matrix.shape}; the texts make it {shape}")
    before = loaded.nnz if loaded.format == "coo" else matrix.nnz  # COO to CSR has summed its duplicates
    matrix.sum_duplicates()
    if matrix.nnz < before:
        raise CorpusError(path, f"{before - matrix.nnz} pairs are there twice")
    matrix.eliminate_zeros()
    rows, columns = matrix.nonzero()
    return pair_matrix(rows, columns, shape)
