"""Input files are cut into units without losing or doubling a row, and each row is read as it is, or rejected with its
reason."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.files import Folder
from raexmc_ray.inputs import units
from raexmc_ray.inputs.find import find_inputs
from raexmc_ray.inputs.job import Job, Task, UnitWorker
from raexmc_ray.inputs.rows import Columns, Rejected, UnitRows, encode_rows
from raexmc_ray.inputs.units import UNIT_ROWS, Unit, UnitReader, cut_files

TEXTS = st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=8), max_size=40)


def read_back(path: Path, order: np.random.Generator | None = None) -> tuple[list[tuple[str, str]], list[Rejected]]:
    """(id, text) of all rows of a file, read unit by unit, and those that were rejected."""
    (file,) = find_inputs([str(path)])
    (cut,) = cut_files([file], Columns())
    todo = [Unit(**unit) for unit in cut.table(0, np.arange(cut.units)).to_pylist()]
    places = order.permutation(len(todo)) if order else range(len(todo))
    reader = UnitReader([file], Columns())
    done = {int(place): reader.read(todo[place]) for place in places}
    found = [done[place] for place in sorted(done)]
    assert sum(len(rows.ids) + len(rows.rejected) for rows in found) == cut.rows
    pairs = [pair for rows in found for pair in zip(rows.ids, rows.texts, strict=True)]
    return pairs, [row for rows in found for row in rows.rejected]


def read_all(folder: Path, columns: Columns = Columns()) -> list[tuple[str, str]]:  # noqa: B008  # it is frozen
    """(id, text) of all rows of all files of a folder."""
    files = find_inputs([str(folder)])
    reader, pairs = UnitReader(files, columns), []
    for number, cut in enumerate(cut_files(files, columns)):
        for unit in cut.table(number, np.arange(cut.units)).to_pylist():
            rows = reader.read(Unit(**unit))
            pairs += zip(rows.ids, rows.texts, strict=True)
    return pairs


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
@settings(max_examples=40, deadline=None)
@given(
    texts=TEXTS,
    unit=st.integers(1, 9),
    size=st.integers(1, 99),
    group=st.integers(1, 13),
    last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_row_is_in_one_unit(
    tmp_path_factory: pytest.TempPathFactory,
    ending: str,
    texts: list[str],
    unit: int,
    size: int,
    group: int,
    last: bool,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("input") / f"rows{ending}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_ROWS", unit)
        patch.setattr(units, "UNIT_BYTES", size)
        patch.setattr(units, "CHUNK_BYTES", 7 if "jsonl" not in ending else 4096)
        rows = [{"id": f"i{place}", "text": text} for place, text in enumerate(texts)]
        if ending == ".parquet":
            pq.write_table(
                pa.table(
                    {"id": [r["id"] for r in rows], "text": texts}, pa.schema({"id": pa.string(), "text": pa.string()})
                ),
                path,
                row_group_size=group,
            )
        else:
            lines = texts if ".txt" in ending else [json.dumps(row) for row in rows]
            content = "\n".join(lines) + ("\n" if last and lines else "")
            texts = (
                content.split("\n")[: content.count("\n") + (not content.endswith("\n") and content != "")]
                if ".txt" in ending
                else texts
            )
            path.write_bytes(gzip.compress(content.encode()) if ending.endswith("gz") else content.encode())
        ids = [str(place) if ".txt" in ending else f"i{place - 1}" for place in range(1, len(texts) + 1)]
        pairs, rejected = read_back(path, np.random.default_rng(seed) if seed else None)
        assert pairs == [(i, t) for i, t in zip(ids, texts, strict=True) if t.strip()]
        blank = [place for place, text in enumerate(texts, 1) if not text.strip()]
        assert [(row.row, row.reason) for row in rejected] == [(place, "the text is empty") for place in blank]


def test_a_row_that_cannot_be_used_is_rejected_with_its_reason(tmp_path: Path) -> None:
    lines = [
        (b'{"id": "a", "text": "vim"}', None, None),
        (b'{"id": 7, "text": "emacs", "more": 1}', None, None),
        (b'{"id": "b", "text": " "}', "b", "the text is empty"),
        (b'{"id": "c"}', "c", "the text is missing"),
        (b'{"id": "d", "text": null}', "d", "the text is null"),
        (b'{"id": "e", "text": 5}', "e", "the text is no string, but int"),
        (b'{"id": "f", "text": "\\ud800"}', "f", "the text is not UTF-8"),
        (b'{"text": "no id"}', None, "the id is missing"),
        (b"{}", None, "the id is missing"),
        (b'{"id": true, "text": "x"}', None, "the id is no string, but bool"),
        (b'{"id": "", "text": "x"}', None, "the id is empty"),
        (b'["id"]', None, "the line is no JSON object"),
        (b"", None, "the line is empty"),
        (b"caf\xe9", None, "the line is not UTF-8"),
        (b'{"id": "g", "te', None, "the line is not JSON"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(line for line, _, _ in lines))
    pairs, rejected = read_back(path)
    assert pairs == [("a", "vim"), ("7", "emacs")]
    assert rejected == [Rejected(row, id_, reason) for row, (_, id_, reason) in enumerate(lines, 1) if reason]

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": [1, None, 3], "text": pa.array(["x", "y", None]).dictionary_encode()}), path)
    pairs, rejected = read_back(path)
    assert pairs == [("1", "x")]
    assert rejected == [Rejected(2, None, "the id is null"), Rejected(3, "3", "the text is null")]

    damaged = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xe9"]).buffers())
    pq.write_table(pa.table({"id": ["1", "2"], "text": damaged}), path)
    assert read_back(path) == ([("1", "ok")], [Rejected(2, "2", "the text is not UTF-8")])


def test_lines_of_several_text_files_have_ids_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("vim\nemacs\n")
    (tmp_path / "c.jsonl").write_text('{"id": 1, "text": "nano"}\n')
    assert [uid for uid, _ in read_all(tmp_path)] == ["1", "2", "1"], "each as it stands there"
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"ed\n"))
    ids = [uid for uid, _ in read_all(tmp_path)]
    assert ids == [f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:2", f"{tmp_path}/b.txt.gz:1", "1"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("torn.parquet", b"PAR1 and then nothing", "is torn, or is no parquet file"),
        ("torn.txt.gz", gzip.compress(b"vim\n" * 100)[:-12], "is torn, or is no text file"),
        ("empty.jsonl.gz", b"", "is torn, or is no json file"),
        ("plain.txt.gz", b"vim\n", "is torn, or is no text file"),
        ("windows.txt", "vim\nemacs\n".encode("utf-16"), "is UTF-16, by its first two bytes: save it as UTF-8"),
        ("windows.jsonl.gz", gzip.compress('{"id": "1", "text": "x"}'.encode("utf-16")), "is UTF-16"),
        ("list.json", b'[\n{"id": 1,\n"text": "x"}\n]', "is no JSON-lines file"),
        ("other.jsonl", b'{"name": "1"}\n', r"no line has 'id'; the first has \['name'\]: name one by --id-column"),
        ("other.json", b'{"id": "1", "title": "x"}\n', "no line has 'text'.*--text-column"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {says}"):
        cut_files(find_inputs([str(tmp_path / name)]), Columns())


def test_json_rows_may_lack_what_is_null(tmp_path: Path) -> None:
    """As Spark writes them: a long way into the file no row has a text."""
    lines = [json.dumps({"id": i} | ({"text": "x"} if i == 500 else {})) for i in range(501)]
    (tmp_path / "a.json").write_text("\n".join(lines))
    (cut,) = cut_files(find_inputs([str(tmp_path / "a.json")]), Columns())
    rows = UnitReader([cut.file], Columns()).read(Unit(**cut.table(0, np.arange(1)).to_pylist()[0]))
    assert rows.ids == ["500"]
    assert len(rows.rejected) == 500
    assert rows.rejected[0].reason == "the text is missing"


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_text_of_several_columns_is_joined_as_a_corpus_joins_it(tmp_path: Path, ending: str) -> None:
    path, columns = tmp_path / f"rows{ending}", Columns("uid", ("title", "content"))
    rows: list[dict] = [
        {"uid": "a", "title": "vim", "content": "an editor"},
        {"uid": "b", "title": "vim", "content": ""},
        {"uid": "c", "title": None, "content": "an editor"},
        {"uid": "d", "title": None, "content": None},
        {"uid": "e", "title": "", "content": " "},
    ]
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        rows += [{"uid": "f", "title": "vim"}, {"uid": "g"}, {"uid": "h", "title": "vim", "content": 1}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (cut,) = cut_files(find_inputs([str(path)]), columns)
    read = UnitReader([cut.file], columns).read(Unit(**cut.table(0, np.arange(1)).to_pylist()[0]))
    texts = dict(zip(read.ids, read.texts, strict=True))
    rejected = {one.id: one.reason for one in read.rejected}
    assert {"a": "vim an editor", "b": "vim", "c": "an editor"}.items() <= texts.items()
    assert {"d": "the text is null", "e": "the text is empty"}.items() <= rejected.items()
    if ending == ".jsonl":
        assert texts["f"] == "vim"
        assert rejected["g"] == "the text is missing"
        assert rejected["h"] == "the text is no string, but int"
    else:
        with pytest.raises(ValueError, match=r"has no column .contents.*--text-column"):
            cut_files(find_inputs([str(path)]), Columns("uid", ("title", "contents")))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"id": [1], "title": ["x"]}, r"has no column 'text'; it has \['id', 'title'\]: name one by --text-column"),
        ({"id": [1.5], "text": ["x"]}, "the column 'id' is double, not strings or integers"),
        ({"id": [1], "text": [b"x"]}, "the column 'text' is binary, not strings: name another by --text-column"),
    ],
)
def test_parquet_with_other_columns_is_refused(tmp_path: Path, columns: dict, says: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"x.parquet: {says}"):
        read_all(tmp_path)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["1"]), pa.array(["vim"]), pa.array(["emacs"])]
    pq.write_table(pa.table(columns, names=["id", "text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: has 2 columns 'text': rename one, or .* by --text-column"):
        read_all(tmp_path)
    pq.write_table(pa.table(columns, names=["id", "text", "other"]), tmp_path / "x.parquet")
    assert read_all(tmp_path) == [("1", "vim")]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("vim\nemacs\n")
    files = find_inputs([str(path)])
    (cut,) = cut_files(files, Columns())
    path.write_text("vim\nnano!\nemacs\n")
    with pytest.raises(ValueError, match=r"a\.txt: was changed while the job ran"):
        UnitReader(files, Columns()).read(Unit(**cut.table(0, np.arange(1)).to_pylist()[0]))
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.txt: is not there: .* or lies where this node does not see it"):
        UnitReader(files, Columns()).read(Unit(**cut.table(0, np.arange(1)).to_pylist()[0]))


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_a_file_that_is_overwritten_while_it_is_open_is_noticed(tmp_path: Path, ending: str) -> None:
    path, rows = tmp_path / f"a{ending}", 3 * UNIT_ROWS
    write_rows(path, [(str(i), f"text {i}") for i in range(rows)])
    files = find_inputs([str(path)])
    (cut,) = cut_files(files, Columns())
    first, second, _ = (Unit(**unit) for unit in cut.table(0, np.arange(3)).to_pylist())
    reader = UnitReader(files, Columns())
    assert len(reader.read(first).texts) == UNIT_ROWS
    write_rows(path, [(str(i), f"other text {i}") for i in range(rows)])  # in place: the same inode
    with pytest.raises(ValueError, match=r"was changed while the job ran|cannot be read"):
        reader.read(second)


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    ids, texts = zip(*rows, strict=True)
    if path.suffix == ".parquet":
        with path.open("wb") as file:
            pq.write_table(pa.table({"id": ids, "text": texts}), file)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in rows))
    else:
        path.write_text("".join(f"{text}\n" for text in texts))


def test_a_part_of_a_data_set_may_have_no_value_in_a_column(tmp_path: Path) -> None:
    """Of a column in which every row is null, pandas writes Arrow's type null."""
    nothing = pa.table({"id": ["a"], "title": ["vim"], "text": pa.nulls(1)})
    pq.write_table(nothing, tmp_path / "x.parquet")
    assert read_all(tmp_path, Columns(texts=("title", "text"))) == [("a", "vim")]
    assert read_back(tmp_path / "x.parquet")[1] == [Rejected(1, "a", "the text is null")]


@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_a_unit_ends_with_the_row_that_fills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(units, "UNIT_ROWS", 3)
    monkeypatch.setattr(units, "UNIT_BYTES", 10)
    monkeypatch.setattr(units, "CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_text("1\n2\n3\n4\n5 is long\n6 is the longest\n7890123\n9\n\n")
    (lines,) = cut_files(find_inputs([str(tmp_path / "a.txt")]), Columns())
    assert lines.firsts.tolist() == [0, 3, 5, 6, 8, 9]
    assert lines.starts.tolist() == [0, 6, 18, 35, 45, 46]
    table = pa.table({"id": np.arange(12), "text": ["x" * (10_000 if 4 <= i < 6 else 1) for i in range(12)]})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2, use_dictionary=False)
    for size, firsts in (
        (1 << 20, [0, 3, 6, 9, 12]),
        (5_000, [0, 3, 5, 6, 9, 12]),  # smaller where the texts are long, and only there
        (1, [*range(13)]),  # one row at the least
    ):
        monkeypatch.setattr(units, "UNIT_BYTES", size)
        (rows,) = cut_files(find_inputs([str(tmp_path / "b.parquet")]), Columns())
        assert rows.firsts.tolist() == firsts


@pytest.mark.parametrize("rows", [60_000, 300])
@pytest.mark.parametrize("ending", [".txt", ".jsonl.gz", ".parquet"])
def test_reading_takes_memory_for_a_unit_not_for_a_file(tmp_path: Path, ending: str, rows: int) -> None:
    text = "many words " * (3_000_000 // rows)  # 33 MB, in one row group
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        table = pa.table({"id": np.arange(rows), "text": [f"{i} {text}" for i in range(rows)]})
        pq.write_table(table, path, use_dictionary=False, write_batch_size=16)  # a page is read as a whole
        del table
    else:
        line = '{{"id": {}, "text": "{}"}}\n' if ".jsonl" in ending else "{} {}\n"
        content = "".join(line.format(i, text) for i in range(rows)).encode()
        path.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
        del content
    pa.table({"a": [1]}).to_pylist()  # imports pandas, the first time
    tracemalloc.start()
    arrow = pa.default_memory_pool()
    (cut,) = cut_files(find_inputs([str(path)]), Columns())
    reader, peak = UnitReader([cut.file], Columns()), 0
    for unit in cut.table(0, np.arange(cut.units)).to_pylist():
        assert len(reader.read(Unit(**unit)).ids) == unit["rows"]
        peak = max(peak, arrow.bytes_allocated())
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cut.rows == rows
    assert peak + python < 16 << 20


def test_what_an_encoder_cannot_take_is_rejected_and_costs_no_other_row() -> None:
    def encode(texts: list[str]) -> np.ndarray:
        if not works or "raises" in texts or len(texts) > 5:
            raise RuntimeError("no such token")
        return np.array([[np.nan if text == "nan" else len(text)] for text in texts], np.float32)

    works, earlier = True, Rejected(2, None, "the id is null")
    rows = UnitRows([1, 3, 4, 5], ["a", "c", "d", "e"], ["vim", "raises", "nan", "nano"], [earlier])
    kept, vectors = encode_rows(rows, encode)
    assert (kept.numbers, kept.ids, kept.texts) == ([1, 5], ["a", "e"], ["vim", "nano"])
    assert vectors.tolist() == [[3], [4]]
    fails = "the encoder fails on the text (RuntimeError)"
    not_finite = "the encoder's embedding of the text is not finite"
    assert kept.rejected == [earlier, Rejected(3, "c", fails), Rejected(4, "d", not_finite)]
    kept, vectors = encode_rows(UnitRows([1], ["c"], ["raises"], []), encode)
    assert (kept.texts, vectors.shape, kept.rejected) == ([], (0, 1), [Rejected(1, "c", fails)])
    six = UnitRows([*range(6)], [*"abcdef"], ["vim"] * 6, [])
    with pytest.raises(RuntimeError):  # of all together, which is no text's fault
        encode_rows(six, encode)
    works = False
    with pytest.raises(RuntimeError):  # nor is this
        encode_rows(rows, encode)


class Unopened(UnitWorker):
    def open(self) -> None:
        raise ValueError("there is no GPU")

    def part_of(self, rows: UnitRows) -> tuple[pa.Table, list[Rejected]]:
        raise NotImplementedError


def test_what_a_worker_cannot_begin_with_is_said_by_its_first_call(tmp_path: Path) -> None:
    worker = Unopened(Task(Folder.at(tmp_path), [], Job.over([], Columns())))
    assert worker(pa.table({}))["error"].tolist() == ["there is no GPU"]
