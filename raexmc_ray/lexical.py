"""The lexical part of a key: TF-IDF over words, projected at random into a few hundred numbers.

A trained tower knows what texts mean, and forgets rare words: names, models, versions. TF-IDF knows nothing else. With
x = [√(1−w)·f(text), √w·g(text)] an inner product of two keys is (1−w) of the tower's cosine and w of (nearly) the
cosine of their TF-IDF vectors, so both are found by one index, and values and aggregation stay what they are.

g is a sparse random projection: each word adds its weight, with a sign, at a few places of its own (Li, Hastie, Church:
Very Sparse Random Projections, KDD 2006). It keeps cosines with an error of about 1/√dimension, needs no vocabulary,
and is the same for a text whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp

from raexmc_ray.progress import Progress

BUCKETS = 1 << 20
"""Words are told apart by their hash among so many."""
PLACES = 8
"""Numbers of a key that a word adds to."""
CHUNK = 8192
"""Texts whose words are in memory at a time."""


@dataclass(frozen=True)
class Lexical:
    """What the lexical part of a key is made with.

    idf_W: float32 [BUCKETS], the inverse document frequency of each word in the texts that it was fitted on, by the
    word's hash; 0 for a word that was in none of them. dimension: numbers in the lexical part. weight: w, in (0, 1).
    """

    idf_W: np.ndarray
    dimension: int
    weight: float

    @classmethod
    def fit(cls, texts: Sequence[str], *, dimension: int, weight: float) -> Lexical:
        """Count in how many of `texts` each word stands: idf = ln((1 + N) / (1 + n)) + 1, as scikit-learn has it."""
        counts_W = np.zeros(BUCKETS, np.int64)
        with Progress("count words", len(texts), "texts", if_long=True) as progress:
            for start in range(0, len(texts), CHUNK):
                chunk = texts[start : start + CHUNK]
                counts_W += np.bincount(_word_counts(chunk).indices, minlength=BUCKETS)
                progress.add(len(chunk))
        idf_W = np.log((1 + len(texts)) / (1 + counts_W)) + 1
        return cls(np.where(counts_W > 0, idf_W, 0).astype(np.float32), dimension, weight)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension]: rows of unit length, or of zeros where a text has no word that is known."""
        parts = [self._project(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def join(self, dense_ND: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, d + dimension], of unit length: the tower's embeddings of `texts` with their lexical part.

        A text without a known word keeps the tower's part alone.
        """
        lexical_NE = self(texts)
        joined = np.concatenate([(1 - self.weight) ** 0.5 * dense_ND, self.weight**0.5 * lexical_NE], axis=1)
        return _unit_rows(joined).astype(np.float32)

    def _project(self, texts: Sequence[str]) -> np.ndarray:
        counts = _word_counts(texts)
        weights = (1 + np.log(counts.data)) * self.idf_W[counts.indices]
        places, signs = _places(counts.indices, self.dimension)
        rows = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        cells = rows[:, None] * self.dimension + places
        flat = np.bincount(cells.ravel(), (signs * weights[:, None]).ravel(), minlength=len(texts) * self.dimension)
        return _unit_rows(flat.reshape(len(texts), self.dimension)).astype(np.float32)


def _word_counts(texts: Sequence[str]) -> sp.csr_matrix:
    """CSR float64 [texts, BUCKETS]: how often each word stands in each text."""
    counts = _vectorizer().transform(texts)
    counts.sort_indices()  # sums are taken in this order, whatever the batch
    return counts


@cache
def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer  # half a second, for those who need it

    return HashingVectorizer(n_features=BUCKETS, token_pattern=r"\w+", norm=None, alternate_sign=False)


def _places(words: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n, PLACES] below `dimension`, float64 [n, PLACES] of ±1) of each word: splitmix64 of the two numbers."""
    mixed: np.ndarray = words.astype(np.uint64)[:, None] * np.uint64(PLACES) + np.arange(PLACES, dtype=np.uint64)
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    places = (mixed >> np.uint64(1)) % np.uint64(dimension)
    return places.astype(np.int64), 1.0 - 2.0 * (mixed & np.uint64(1)).astype(np.float64)


def _unit_rows(rows_ND: np.ndarray) -> np.ndarray:
    """The rows scaled to unit length; those of zeros stay what they are."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND))
    return rows_ND / np.where(lengths > 0, lengths, 1)[:, None]
