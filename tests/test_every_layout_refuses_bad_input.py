"""Damage that is rarer, or in another layout than JSON lines, is refused with file, line and field as well."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from helpers import json_lines, write_tiny_corpus

from raexmc_ray.corpus import CorpusError, read_corpus
from raexmc_ray.corpus.lines import read_lines

ROW = {"uid": "9", "title": "one more", "target_ind": [0]}


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CorpusError) as error:
        read_corpus(folder)
    for word in words:
        assert word in str(error.value), f"{word!r} in {error.value}"


@pytest.mark.parametrize("name", ["trn.json", "tst.json", "lbl.json"])
def test_a_gzip_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    plain = write_tiny_corpus(tmp_path) / name
    whole = gzip.compress(plain.read_bytes(), mtime=0)
    plain.unlink()
    for size in range(len(whole)):
        (tmp_path / f"{name}.gz").write_bytes(whole[:size])
        refused(tmp_path, f"{name}.gz, line ", "cut short or damaged")
    (tmp_path / f"{name}.gz").write_bytes(whole)
    assert len(read_corpus(tmp_path).train) == 4


def test_a_gzip_with_an_altered_byte_is_never_taken_for_another_text(tmp_path: Path) -> None:
    plain = write_tiny_corpus(tmp_path) / "trn.json"
    expected = read_corpus(tmp_path).fingerprint
    whole = gzip.compress(plain.read_bytes(), mtime=0)
    plain.unlink()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "trn.json.gz").write_bytes(bytes(damaged))
        try:  # a few bytes of the header mean nothing
            assert read_corpus(tmp_path).fingerprint == expected
        except CorpusError as error:
            assert "trn.json.gz, line " in str(error)  # noqa: PT017


def test_what_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (write_tiny_corpus(tmp_path) / "tst.json").rename(tmp_path / "tst.json.gz")
    refused(tmp_path, "tst.json.gz, line 1")


def test_plain_and_gzip_side_by_side_are_refused(tmp_path: Path) -> None:
    (write_tiny_corpus(tmp_path) / "trn.json.gz").write_bytes(gzip.compress(b""))
    refused(tmp_path, "trn.json", "keep one")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json_lines([{**ROW, "target_ind": [10**30]}]), ["target_ind", "out of range"]),
        (json_lines([{**ROW, "target_ind": [True]}]), ["target_ind"]),
        (json_lines([{**ROW, "target_ind": "0"}]), ["target_ind"]),
        (json_lines([{**ROW, "target_ind": None}]), ["target_ind"]),
        (json_lines([{**ROW, "target_rel": [float("nan")]}]), ["target_rel", "finite"]),
        (json_lines([{**ROW, "target_rel": [0.0]}]), ["target_rel", "above zero"]),
        (json_lines([{**ROW, "target_rel": []}]), ["target_rel", "0 values for 1 labels"]),
        (json_lines([{**ROW, "uid": ""}]), ["uid", "empty"]),
        (json_lines([{**ROW, "uid": None}]), ["uid"]),
        (json_lines([{**ROW, "uid": 0}]), ["uid", "duplicate", "line 1"]),
        (b'{"uid": "9", "title": "\\ud800", "target_ind": []}\n', ["broken JSON"]),
        (b'{"uid": "9", "title": "t", "target_ind": []} x\n', ["broken JSON"]),
        (b'\xef\xbb\xbf{"uid": "9", "title": "t", "target_ind": []}\n', ["broken JSON"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: list[str]) -> None:
    path = write_tiny_corpus(tmp_path) / "trn.json"
    path.write_bytes(path.read_bytes() + line)
    refused(tmp_path, "trn.json, line 5", *words)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"0 0\n4 0\n", ["line 2", "'row'", "out of range"]),
        (b"0 0\n\n0 3\n", ["line 3", "'label'", "out of range"]),
        (b"0 0 0\n", ["line 1", "row label"]),
        (b"0 x\n", ["line 1", "row label"]),
        (b"0 1.0\n", ["line 1", "row label"]),
        (b"0 \xff\n", ["line 1", "UTF-8"]),
    ],
)
def test_a_bad_filter_file_is_named(tmp_path: Path, part: str, data: bytes, words: list[str]) -> None:
    (write_tiny_corpus(tmp_path) / f"filter_labels_{part}.txt").write_bytes(data)
    refused(tmp_path, f"filter_labels_{part}.txt", *words)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "Y.txt").write_bytes("\ufeffvim\r\n\ufeffnano\n".encode())
    assert list(read_lines(tmp_path / "Y.txt")) == [(1, "vim"), (2, "\ufeffnano")]


def test_windows_lines_and_repeated_filter_pairs_are_read(tmp_path: Path) -> None:
    path = write_tiny_corpus(tmp_path) / "trn.json"
    before = read_corpus(tmp_path).fingerprint
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "filter_labels_train.txt").write_bytes(b"0 1\r\n0 1\r\n")
    corpus = read_corpus(tmp_path)
    assert corpus.fingerprint == before
    assert corpus.train.filtered.nnz == 1
    assert corpus.train.filtered[0, 1] == 1


GOOD = {"uid": ["a", "b"], "text": ["one", "two"], "labels": [[0], []]}


def write_parquet(folder: Path, **change: list) -> Path:
    columns = {**GOOD, **change}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({name: v for name, v in columns.items() if v}), folder / "instances.parquet")
    pq.write_table(pa.table({"uid": ["l"], "text": ["a label"]}), folder / "labels.parquet")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [[0], [-1]]}, ["line 2", "'labels'", "negative"]),
        ({"labels": [[0], [1]]}, ["line 2", "'labels'", "out of range"]),
        ({"labels": [[0], [0, 0]]}, ["line 2", "'labels'", "twice"]),
        ({"labels": [[0.5], []]}, ["'labels'", "integers"]),
        ({"labels": [["0"], []]}, ["'labels'", "rows of labels.parquet, counted from 0", "string"]),
        ({"labels": [0, 0]}, ["'labels'", "lists of integers"]),
        ({"labels": [[], [0, None]]}, ["line 2", "'labels'", "null"]),
        ({"labels": [[None], []]}, ["line 1", "'labels'", "null"]),
        ({"labels": []}, ["'labels'", "no such column"]),
        ({"text": []}, ["'text'", "no such column"]),
        ({"text": ["one", " "]}, ["line 2", "'text'", "empty"]),
        ({"text": ["one", None]}, ["line 2", "'text'", "null", "give the row a text"]),
        ({"text": ["one", "t\0"]}, ["line 2", "'text'", "NUL"]),
        ({"uid": ["a", "a"]}, ["line 2", "'uid'", "duplicate", "first on line 1"]),
        ({"uid": ["a", None]}, ["line 2", "'uid'", "null", "give the row a uid"]),
        ({"uid": ["a", ""]}, ["line 2", "'uid'", "empty"]),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, change: dict[str, list], words: list[str]) -> None:
    refused(write_parquet(tmp_path, **change), "instances.parquet", *words)


def test_a_label_without_a_text_is_not_told_to_go(tmp_path: Path) -> None:
    """Dropped, its row would give each label behind it another index, and nothing would say so."""
    pq.write_table(pa.table({"uid": ["l"], "text": [None]}), write_parquet(tmp_path / "parquet") / "labels.parquet")
    (write_tiny_corpus(tmp_path / "json") / "lbl.json").write_bytes(json_lines([{"uid": "l", "title": ""}]))
    for layout in ("parquet", "json"):
        refused(tmp_path / layout, "line 1", "drop it if it is no label's")


def test_parquet_without_a_label_is_legal_and_torn_parquet_is_refused(tmp_path: Path) -> None:
    corpus = read_corpus(write_parquet(tmp_path, labels=[None, [0]]))
    assert corpus.train.unlabelled == 1
    assert corpus.train.relevance.toarray().tolist() == [[0], [1]]
    path = tmp_path / "instances.parquet"
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(tmp_path, "instances.parquet", "not a whole Parquet file")
    path.unlink()
    refused(tmp_path, "instances.parquet", "missing")


def test_only_the_columns_of_a_corpus_count(tmp_path: Path) -> None:
    path = write_parquet(tmp_path) / "instances.parquet"
    table, before = pq.read_table(path), read_corpus(tmp_path).fingerprint
    pq.write_table(table.append_column("price", [[1, 2]]).append_column("price", [[3, 4]]), path)
    assert read_corpus(tmp_path).fingerprint == before
    pq.write_table(table.append_column("text", [["three", "four"]]), path)
    refused(tmp_path, "instances.parquet", "'text'", "2 columns")


def write_raw(folder: Path) -> Path:
    (folder / "raw").mkdir()
    for name, texts in (("trn_X", "one\ntwo\n"), ("Y", "label\nother\n")):
        (folder / f"raw/{name}.txt").write_text(texts)
    sp.save_npz(folder / "Y.trn.npz", sp.csr_matrix(np.array([[1, 0], [0, 0]], np.float32)))
    return folder


def shrink(folder: Path) -> None:
    sp.save_npz(folder / "Y.trn.npz", sp.csr_matrix((2, 3)))


def repeat(folder: Path) -> None:
    sp.save_npz(folder / "Y.trn.npz", sp.coo_array((np.ones(2), ([0, 0], [1, 1])), shape=(2, 2)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "raw/trn_X.txt").write_text("one\n\n"), ["trn_X.txt, line 2", "empty"]),
        (lambda folder: (folder / "raw/trn_X.txt").write_bytes(b"one\n\xff\n"), ["trn_X.txt, line 2", "UTF-8"]),
        (lambda folder: (folder / "raw/Y.txt").write_bytes(b"la\0bel\nother\n"), ["Y.txt, line 1", "NUL"]),
        (lambda folder: (folder / "raw/trn_X.txt").unlink(), ["trn_X.txt", "missing"]),
        (lambda folder: (folder / "Y.trn.npz").unlink(), ["Y.trn.npz", "missing"]),
        (lambda folder: (folder / "raw/trn_X.txt").write_text("one\n"), ["Y.trn.npz", "shape (2, 2)", "(1, 2)"]),
        (shrink, ["Y.trn.npz", "shape (2, 3)", "(2, 2)"]),
        (repeat, ["Y.trn.npz", "twice"]),
    ],
)
def test_bad_raw_text_is_named(tmp_path: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    assert read_corpus(write_raw(tmp_path)).train.unlabelled == 1
    damage(tmp_path)
    refused(tmp_path, *words)


def test_a_pickle_in_the_relevance_is_not_loaded(tmp_path: Path) -> None:
    np.savez(write_raw(tmp_path) / "Y.trn.npz", format=np.array({"code": 1}, object))
    refused(tmp_path, "Y.trn.npz", "not a whole SciPy sparse matrix")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    """As Spark writes them. A test part that is one is not taken for none."""
    layouts: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
        "json": (write_tiny_corpus, ["tst.json", "trn.json", "lbl.json", "filter_labels_test.txt"]),
        "parquet": (write_parquet, ["test.parquet", "instances.parquet", "labels.parquet"]),
        "raw": (write_raw, ["raw/tst_X.txt", "raw/trn_X.txt", "Y.trn.npz", "raw/Y.txt"]),
    }
    for layout, (write, names) in layouts.items():
        for name in names:
            folder = tmp_path / layout / name.replace("/", "-")
            folder.mkdir(parents=True)
            write(folder)
            (folder / name).unlink(missing_ok=True)
            (folder / name).mkdir()
            (folder / name / "part-0").write_bytes(b"")
            refused(folder, f"{name}: is a folder, and must be one file")
