"""What a corpus is in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import ArrayLike

from raexmc_ray.ragged import longest

DIGESTED_AT_ONCE = 65_536
"""Strings."""


class CorpusError(ValueError):
    """Input that cannot be read as a corpus: names the file, the line (from 1), the field, and the remedy."""

    def __init__(self, path: Path, what: str, *, line: int | None = None, field: str | None = None) -> None:
        where = str(path) + (f", line {line}" if line else "") + (f", field {field!r}" if field else "")
        super().__init__(f"{where}: {what}")


@dataclass(frozen=True)
class Split:
    """Instances with their labels.

    texts: Arrow table (uid: string, text: string), a row an instance.
    relevance: CSR [rows, L] of float32 ones, indices sorted.
    filtered: CSR [rows, L] of float32 ones: pairs that are dropped from predictions before scoring, because
        label and instance are the same thing.
    """

    texts: pa.Table
    relevance: sp.csr_matrix
    filtered: sp.csr_matrix

    def __post_init__(self) -> None:
        assert self.relevance.shape == self.filtered.shape, "filter pairs and relevance differ in shape"
        assert len(self.texts) == self.relevance.shape[0], "texts and relevance differ in rows"

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def labels_per_row(self) -> np.ndarray:
        """int32 [rows]: how many labels each instance has."""
        return np.diff(self.relevance.indptr)

    @property
    def most_filtered(self) -> int:
        """Filter pairs of the row that has most: labels to predict beyond those that are to be left."""
        return longest(self.filtered.indptr)

    @property
    def unlabelled(self) -> int:
        """Instances without a label: legal, not trained on, excluded from every mean of the metrics."""
        return int((self.labels_per_row == 0).sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the uids, the relevance and the filter pairs: which rows are measured, and against what. Not over
        the texts: titles may be compared with titles and contents."""
        digest = hashlib.sha256()
        digest_strings(digest, self.texts["uid"])
        for matrix in (self.relevance, self.filtered):
            for array in (matrix.indptr, matrix.indices):
                digest.update(array.astype(np.int64).tobytes())
        return digest.hexdigest()

    def without_unseen(self, seen_L: np.ndarray) -> Split:
        """The split in which labels that are not seen are neither right nor wrong where they were right: they become
        filter pairs. seen_L: bool.

        The public benchmarks have no label without a training instance, in their test parts or at all. Left to be
        found, such labels would make rows held out richer in them than a test part is; taken away but left to be
        predicted, they would count as mistakes of the labels' own keys. Settings chosen on either would be wrong.
        """
        unseen = sp.csr_matrix(self.relevance @ sp.diags_array((~seen_L).astype(np.float32)))
        relevance = sp.csr_matrix(self.relevance - unseen)
        filtered = sp.csr_matrix(self.filtered.maximum(unseen))
        for matrix in (relevance, filtered):
            matrix.eliminate_zeros()
            matrix.sort_indices()
        return Split(self.texts, relevance, filtered)

    def take(self, rows: np.ndarray) -> Split:
        """The split of these rows, in this order."""
        return Split(_take_rows(self.texts, rows), self.relevance[rows], self.filtered[rows])


@dataclass(frozen=True)
class Corpus:
    """Training instances, test instances (may be empty) and labels (Arrow table: uid, text)."""

    train: Split
    test: Split
    labels: pa.Table

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            assert split.relevance.shape[1] == len(self.labels), "relevance and labels differ"

    def hold_out(self, share: float, seed: int = 0) -> Corpus:
        """The corpus in which `share` of the training rows stands in for the test part.

        A pure function of the corpus, the share and the seed. The filter pairs of the training part hold for
        the rows held out, and labels that no remaining training row has are taken from them (`without_unseen`).
        """
        held_out = self.held_out_places(share, seed)
        kept = np.setdiff1d(np.arange(len(self.train)), held_out)
        train, test = self.train.take(kept), self.train.take(held_out)
        seen = np.bincount(train.relevance.indices, minlength=len(self.labels)) > 0
        return Corpus(train, test.without_unseen(seen), self.labels)

    def held_out_places(self, share: float, seed: int = 0) -> np.ndarray:
        """int64, sorted: the training rows that `hold_out` holds out."""
        order = np.random.default_rng([seed, 1]).permutation(len(self.train))
        return np.sort(order[: round(share * len(order))])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the training texts, the label texts and the training relevance."""
        digest = hashlib.sha256()
        for table in (self.train.texts, self.labels):
            for name in ("uid", "text"):
                digest_strings(digest, table[name])
                digest.update(b"\0\0")
        digest.update(self.train.relevance.indptr.astype(np.int64).tobytes())
        digest.update(self.train.relevance.indices.astype(np.int64).tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for people: how much of what there is."""
        rows = len(self.train) or 1
        return (
            f"{len(self.train):,} training instances ({self.train.unlabelled:,} without a label), "
            f"{len(self.test):,} test instances ({self.test.unlabelled:,} without a label), "
            f"{len(self.labels):,} labels, {self.train.relevance.nnz / rows:.2f} labels a row"
        )


def digest_strings(digest: Any, strings: pa.ChunkedArray) -> None:
    """Update a hash with these strings, a NUL between two of them: a slice at a time, since all of them joined would be
    several times what they are here, at four bytes a character where one of them is beyond the BMP."""
    for start in range(0, len(strings), DIGESTED_AT_ONCE):
        joined = "\0".join(strings.slice(start, DIGESTED_AT_ONCE).to_pylist())
        digest.update((("\0" if start else "") + joined).encode())


def text_table(uids: Sequence[str], texts: Sequence[str]) -> pa.Table:
    """The Arrow table (uid, text) of these rows."""
    return pa.table({"uid": pa.array(uids, pa.string()), "text": pa.array(texts, pa.string())})


def _take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """These rows of `table`, in this order, from each of its chunks by itself: pyarrow's `take` would join the chunks
    first, and an array of strings holds no more than 2 GiB."""
    batches = table.to_batches()
    firsts = np.cumsum([0, *map(len, batches)])
    chunk_of = np.searchsorted(firsts, rows, side="right") - 1
    cuts = np.flatnonzero(np.diff(chunk_of)) + 1
    return pa.Table.from_batches(
        [
            batches[run[0]].take(pa.array(part - firsts[run[0]]))
            for run, part in zip(np.split(chunk_of, cuts), np.split(rows, cuts), strict=True)
            if len(run)
        ],
        table.schema,
    )


def pair_matrix(rows: ArrayLike, columns: ArrayLike, shape: tuple[int, int]) -> sp.csr_matrix:
    """CSR of float32 ones at (rows, columns), which are distinct pairs within `shape`; indices sorted."""
    row, column = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    matrix = sp.csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=shape)
    matrix.sort_indices()
    return matrix
