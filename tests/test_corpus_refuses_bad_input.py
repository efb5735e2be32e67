"""A corpus is read whole, or refused with the file, the line, the field and the remedy."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from conftest import ROOT

from raexmc_ray import progress
from raexmc_ray.corpus import Corpus, CorpusError, Split, read_corpus
from raexmc_ray.corpus import lines as corpus_lines

TRAIN = [
    {"uid": "a", "title": "red", "content": "a colour", "target_ind": [0, 2]},
    {"uid": "b", "title": "blue", "target_ind": []},
    {"uid": "c", "title": "green", "target_ind": [1], "target_rel": [1.0]},
]
LABELS = [{"uid": f"l{i}", "title": f"label {i}"} for i in range(3)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, **files: bytes) -> Path:
    content = {"trn.json": lines(TRAIN), "lbl.json": lines(LABELS), "tst.json": lines(TRAIN[:1])}
    content |= {name.replace("_", "."): data for name, data in files.items()}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def same(one: Corpus, other: Corpus) -> bool:
    return one.fingerprint == other.fingerprint and (one.test.relevance != other.test.relevance).nnz == 0


def test_a_corpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "filter_labels_train.txt").write_text("0 1\n2 0\n")
    corpus = read_corpus(write(tmp_path))
    assert corpus.train.relevance.toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert corpus.train.filtered.toarray().tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert corpus.train.unlabelled == 1
    assert "1 without a label" in corpus.describe()
    assert corpus.train.texts["text"].to_pylist() == ["red", "blue", "green"]
    both = read_corpus(tmp_path, ("title", "content"))
    assert both.train.texts["text"].to_pylist() == ["red a colour", "blue", "green"]


def bad(**change: object) -> bytes:
    return lines([TRAIN[0], {**TRAIN[1], **change}])


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("trn_json", lines(TRAIN[:1]) + b'{"uid": "b", "title', ["line 2", "broken JSON"]),
        ("trn_json", lines(TRAIN[:1]) + b"[1]\n", ["line 2"]),
        ("trn_json", lines(TRAIN[:1]) + b"\n", ["line 2", "empty"]),
        ("trn_json", bad(target_ind=[3]), ["line 2", "target_ind", "out of range"]),
        ("trn_json", bad(target_ind=[-1]), ["line 2", "target_ind", "negative"]),
        ("trn_json", bad(target_ind=[1, 1]), ["line 2", "target_ind", "twice"]),
        ("trn_json", bad(target_ind=[1.5]), ["line 2", "target_ind"]),
        ("trn_json", bad(target_ind=[1], target_rel=[1.0, 1.0]), ["line 2", "target_rel"]),
        ("trn_json", bad(target_ind=[1], target_rel=[-1.0]), ["line 2", "target_rel"]),
        ("trn_json", lines([TRAIN[0], {"uid": "b", "title": "blue"}]), ["line 2", "target_ind"]),
        ("trn_json", bad(title=""), ["line 2", "title", "empty"]),
        ("trn_json", bad(title=" \t"), ["line 2", "title", "empty"]),
        ("trn_json", bad(title="nul\0"), ["line 2", "title", "NUL"]),
        ("trn_json", bad(title=7), ["line 2", "title"]),
        ("trn_json", bad(uid="a"), ["line 2", "uid", "duplicate", "line 1"]),
        ("trn_json", lines(TRAIN[:1]) + b'{"uid": "b\0"}\n', ["line 2", "NUL"]),
        ("trn_json", lines(TRAIN[:1]) + b'{"uid": "\xff"}\n', ["line 2", "UTF-8"]),
        ("trn_json", b"", ["no instance"]),
        ("lbl_json", b"", ["no label"]),
        ("lbl_json", lines([*LABELS, LABELS[0]]), ["line 4", "uid", "duplicate"]),
        ("filter_labels_train.txt", b"0 1\n0 9\n", ["line 2", "label", "out of range"]),
        ("filter_labels_train.txt", b"0\n", ["line 1", "row label"]),
        ("filter_labels_train.txt", b"0 -1\n", ["line 1", "row label"]),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: Path, name: str, data: bytes, says: list[str]) -> None:
    write(tmp_path)
    file = name.replace("_json", ".json")
    (tmp_path / file).write_bytes(data)
    with pytest.raises(CorpusError) as error:
        read_corpus(tmp_path)
    for word in [file, *says]:
        assert word in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_gzip_that_is_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    write(tmp_path)
    rows = [{"uid": str(i), "title": f"text {i * 7919}", "target_ind": [i % 3]} for i in range(2000)]
    whole = gzip.compress(lines(rows))
    (tmp_path / "trn.json").unlink()
    (tmp_path / "trn.json.gz").write_bytes(whole)
    assert len(read_corpus(tmp_path).train) == 2000
    (tmp_path / "trn.json.gz").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorpusError, match=r"trn\.json\.gz, line \d+: .*cut short"):
        read_corpus(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"corpus\.path"):
        read_corpus(tmp_path / "none")
    with pytest.raises(CorpusError, match=r"lbl\.json"):
        read_corpus(tmp_path)
    (tmp_path / "lbl.json").write_bytes(lines(LABELS))
    with pytest.raises(CorpusError, match=r"trn\.json"):
        read_corpus(tmp_path)


def test_all_layouts_give_the_same_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fields, which one of them has, do nothing in the others, and that is said."""
    train = [{**row, "uid": str(i)} for i, row in enumerate(TRAIN)]
    labels = [{**row, "uid": str(i)} for i, row in enumerate(LABELS)]
    for name in ("json", "parquet", "raw"):
        (tmp_path / name).mkdir()
    expected = read_corpus(
        write(tmp_path / "json", trn_json=lines(train), lbl_json=lines(labels), tst_json=lines(train[:1]))
    )

    def table(rows: list[dict]) -> pa.Table:
        columns = {"uid": [r["uid"] for r in rows], "text": [r["title"] for r in rows]}
        return pa.table(columns | {"labels": pa.array([r["target_ind"] for r in rows], pa.list_(pa.int64()))})

    pq.write_table(table(train), tmp_path / "parquet/instances.parquet")
    pq.write_table(table(train[:1]), tmp_path / "parquet/test.parquet")
    pq.write_table(
        pa.table({"uid": [r["uid"] for r in labels], "text": [r["title"] for r in labels]}),
        tmp_path / "parquet/labels.parquet",
    )
    assert same(read_corpus(tmp_path / "parquet"), expected)

    (tmp_path / "raw/raw").mkdir()
    for name, rows in (("trn_X", train), ("tst_X", train[:1]), ("Y", labels)):
        (tmp_path / f"raw/raw/{name}.txt").write_text("".join(r["title"] + "\n" for r in rows))
    for name, split in (("trn", expected.train), ("tst", expected.test)):
        sp.save_npz(tmp_path / f"raw/Y.{name}.npz", split.relevance)
    assert same(read_corpus(tmp_path / "raw"), expected)

    assert not caplog.text
    for name, file in (("parquet", "labels.parquet"), ("raw", "raw/Y.txt")):
        assert same(read_corpus(tmp_path / name, ("title", "content")), expected)
        assert f"corpus.fields is ['title', 'content'], and does nothing: {tmp_path / name / file} has" in caplog.text

    pq.write_table(table([train[0], {**train[1], "target_ind": [3]}]), tmp_path / "parquet/instances.parquet")
    with pytest.raises(CorpusError, match=r"instances\.parquet, line 2, field 'labels': label index 3 is out of range"):
        read_corpus(tmp_path / "parquet")
    (tmp_path / "raw/Y.trn.npz").write_bytes(b"torn")
    with pytest.raises(CorpusError, match=r"Y\.trn\.npz"):
        read_corpus(tmp_path / "raw")


def test_rows_held_out_are_like_a_test_part(tmp_path: Path) -> None:
    whole = read_corpus(ROOT / "examples/debian-related")
    held = whole.hold_out(0.1)
    assert len(held.test) == round(0.1 * len(whole.train))
    assert len(held.train) + len(held.test) == len(whole.train)
    uids = [set(split.texts["uid"].to_pylist()) for split in (held.train, held.test)]
    assert not uids[0] & uids[1]
    assert set(held.test.relevance.indices) <= set(held.train.relevance.indices), "no label without a training row"
    assert np.array_equal(held.test.relevance.indices, whole.hold_out(0.1).test.relevance.indices)


def test_rows_are_taken_from_any_number_of_chunks() -> None:
    """More than 2 GiB of text is in chunks; here a text of 1 MiB, many times over in the same place."""
    chunk, none = pa.array(["x" * (1 << 20)]), sp.csr_matrix((2100, 1), dtype=np.float32)
    uids = pa.chunked_array([map(str, range(start, start + 70)) for start in range(0, 2100, 70)])
    split = Split(pa.table({"uid": uids, "text": pa.chunked_array([chunk] * 2100)}), none, none)
    for rows in ([], [0, 5, 2000], [2099, 3, 4, 3]):
        taken = split.take(np.array(rows, np.int64))
        assert taken.texts["uid"].to_pylist() == [str(row) for row in rows]
        assert taken.texts.schema == split.texts.schema


def test_the_shipped_corpora_are_whole() -> None:
    related = read_corpus(ROOT / "examples/debian-related")
    assert (len(related.train), len(related.test), len(related.labels)) == (11_797, 4_014, 15_785)
    depends = read_corpus(ROOT / "examples/debian-depends")
    assert (len(depends.train), len(depends.test), len(depends.labels)) == (33_219, 13_533, 30_838)


@pytest.mark.parametrize("name", ["trn.json", "trn.json.gz"])
def test_a_long_reading_is_told_in_bytes_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(corpus_lines, "TOLD_EVERY", 2)
    rows = [{"uid": f"r{i}", "title": f"text {i}", "target_ind": []} for i in range(500)]
    folder = write(tmp_path)
    (folder / "trn.json").unlink()
    (folder / name).write_bytes(gzip.compress(lines(rows)) if name.endswith(".gz") else lines(rows))
    with caplog.at_level(logging.INFO, "raexmc_ray"):
        assert len(read_corpus(folder).train) == 500
    size = f"{(folder / name).stat().st_size:,}"
    told = [line for line in caplog.messages if line.startswith(f"read {name}: ")]
    assert len(told) > 2
    assert told[-1].startswith(f"read {name}: {size} of {size} bytes")
