"""The lexical part of a key: TF-IDF's cosines, whatever the batch, and an encoder that carries it wherever it goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_encoder
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.lexical import Lexical
from raexmc_ray.recipe import LexicalSection, MemorySection

TEXTS = ["vim: Vi IMproved", "vim-gtk3: Vi IMproved, GTK3 version", "emacs: GNU Emacs editor", "GNU GNU GNU", "?!", ""]
LEXICAL = Lexical.fit(TEXTS, dimension=64, weight=0.3)


def test_inner_products_are_tfidf_cosines_within_the_projections_error(tiny_corpus: Path) -> None:
    corpus = read_corpus(tiny_corpus)
    texts = corpus.train.texts["text"].to_pylist()
    theirs = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(texts)
    queries = corpus.test.texts["text"].to_pylist()
    exact = (theirs.transform(queries) @ theirs.transform(texts).T).toarray()
    for dimension in (256, 4096):
        ours = Lexical.fit(texts, dimension=dimension, weight=0.5)
        errors = ours(queries) @ ours(texts).T - exact
        assert np.sqrt((errors**2).mean()) < 1.2 / dimension**0.5
        assert abs(errors.mean()) < 0.2 / dimension**0.5, "no bias"


def test_a_joined_similarity_is_the_weighted_sum_of_both() -> None:
    dense_ND = tiny_encoder().encode(TEXTS[:4])
    joined, lexical_NE = LEXICAL.join(dense_ND, TEXTS[:4]), LEXICAL(TEXTS[:4])
    assert np.allclose(joined @ joined.T, 0.7 * dense_ND @ dense_ND.T + 0.3 * lexical_NE @ lexical_NE.T, atol=1e-6)


@given(st.permutations(range(len(TEXTS))), st.integers(1, len(TEXTS)))
def test_a_text_gets_the_same_bits_in_any_batch(order: list[int], size: int) -> None:
    texts = [TEXTS[i] for i in order]
    parts = np.concatenate([LEXICAL(texts[start : start + size]) for start in range(0, len(texts), size)])
    assert np.array_equal(parts, LEXICAL(TEXTS)[list(order)])


def test_a_text_without_a_known_word_keeps_the_towers_part_alone() -> None:
    dense_ND = tiny_encoder().encode(["?!", "neverseen"])
    joined = LEXICAL.join(dense_ND, ["?!", "neverseen"])
    assert np.allclose(joined[:, : dense_ND.shape[1]], dense_ND, atol=1e-6)
    assert not joined[:, dense_ND.shape[1] :].any()


def test_an_encoder_is_saved_with_it_and_is_another_one(tmp_path: Path) -> None:
    tower = tiny_encoder()
    encoder = tower.with_lexical(LEXICAL)
    encoder.save(tmp_path)
    again = TextEncoder.load(str(tmp_path))
    assert np.array_equal(again.encode(TEXTS[:5]), encoder.encode(TEXTS[:5])), "to the bit"
    assert again.fingerprint == encoder.fingerprint
    lighter = tower.with_lexical(Lexical(LEXICAL.idf_W, 64, 0.2))
    other = tower.with_lexical(Lexical.fit(TEXTS[:2], dimension=64, weight=0.3))
    assert len({e.fingerprint for e in (tower, encoder, lighter, other)}) == 4
    assert (tower.dimension, encoder.dimension) == (encoder.width, encoder.width + 64)


def test_a_memory_is_asked_with_the_part_that_it_was_built_with(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus, name = read_corpus(tiny_corpus), "zzyzx9"
    texts = corpus.labels["text"].to_pylist()
    texts[7] = f"{name}: a tool"
    corpus = type(corpus)(corpus.train, corpus.test, corpus.labels.set_column(1, "text", [texts]))
    margins = {}
    for weight in (0.0, 0.5):
        settings = MemorySection(shards=2, lexical=LexicalSection(weight=weight, dimension=256))
        raexmc_ray.build(corpus, tiny_encoder(), tmp_path / str(weight), settings)
        memory = raexmc_ray.open(tmp_path / str(weight))
        assert memory.manifest.dimension == memory.encoder.dimension == tiny_encoder().width + (256 if weight else 0)
        found = memory.predict([f"something about {name}"], k=2, lambda_=0, evidence=1)[0]
        similarities = [label.evidence[0].similarity for label in found]
        assert found[0].label == 7
        margins[weight] = similarities[0] - similarities[1]
    assert margins[0.5] > margins[0.0] + 0.05, "the rare word counts"
    with pytest.raises(ValueError, match="weight"):
        MemorySection.model_validate({"lexical": {"weight": 1.0}})
