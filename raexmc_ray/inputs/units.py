"""Input files in units of consecutive rows, bounded in rows and bytes: cut without keeping a row, and read one unit at
a time.

A file is cut by its Parquet metadata, or by one pass over its bytes for the ends of its lines. A `UnitReader` reads
units wherever they are needed. It keeps its place in a file: the next unit goes on from there, and what lies between
two units of a packed file or of a large Parquet row group is passed over, not read again from the beginning. Both take
memory for a unit, not for a file.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raexmc_ray.inputs.find import InputFile, modified_ns
from raexmc_ray.inputs.rows import (
    Columns,
    UnitRows,
    Unusable,
    column_cells,
    decode_line,
    join_cells,
    judge_rows,
    parse_line,
)
from raexmc_ray.progress import Progress

UNIT_ROWS = 1024
"""Rows of one file in a unit, at most."""
UNIT_BYTES = 4 << 20
"""Of long texts a unit has fewer rows: it ends with the row that makes it so large. Parquet is cut by its metadata, as
if the rows of a row group were equally large, and as large as they are encoded."""
CHUNK_BYTES = 4 << 20
PARQUET_BUFFER_BYTES = 1 << 20
READERS = 8
"""Files that are cut at a time."""
SILENT_BYTES = 1 << 30
"""To be cut without a line of progress."""
NEWLINE = 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
"""How such a file begins, which is no UTF-8."""


@dataclass(frozen=True)
class CutFile:
    """A file, and int64 [units + 1]: the row at which each unit begins, and the last one ends; the same of the byte, in
    the unpacked file, for units of lines. Parquet has none: its units are known by their rows."""

    file: InputFile
    firsts: np.ndarray
    starts: np.ndarray

    @property
    def units(self) -> int:
        return len(self.firsts) - 1

    @property
    def rows(self) -> int:
        return int(self.firsts[-1])

    def table(self, file: int, numbers: np.ndarray) -> pa.Table:
        """Its units of these numbers, as those of the `file`-th file: the fields of `Unit`, int64."""
        first, rows = self.firsts[numbers], self.firsts[numbers + 1] - self.firsts[numbers]
        start, stop = (self.starts[numbers], self.starts[numbers + 1]) if len(self.starts) else (first, first)
        columns = (np.full(len(numbers), file), numbers, first, rows, start, stop)
        return pa.table(dict(zip(Unit._fields, columns, strict=True)))


class Unit(NamedTuple):
    """Rows first … first + rows − 1 of the `file`-th file, its unit of this number: lines at bytes start … stop − 1."""

    file: int
    number: int
    first: int
    rows: int
    start: int
    stop: int


class UnreadableError(ValueError):
    """A file cannot be read, or is no longer what it was."""


def cut_files(files: Sequence[InputFile], columns: Columns) -> list[CutFile]:
    """Each file cut into units. Raises ValueError that names a file that is torn or has not these columns."""
    total = sum(file.size for file in files if file.kind != "parquet")
    with ThreadPoolExecutor(READERS) as threads:
        cut = threads.map(lambda file: cut_file(file, columns), files)
        if total < SILENT_BYTES:
            return list(cut)
        done = []
        with Progress("find the rows", total, "bytes") as progress:
            for part in cut:
                done.append(part)
                progress.add(part.file.size if part.file.kind != "parquet" else 0)
        return done


def cut_file(file: InputFile, columns: Columns) -> CutFile:
    """A file cut into units. Raises ValueError that names the file where it is torn or has not these columns."""
    try:
        return _cut_parquet(file, columns) if file.kind == "parquet" else _cut_lines(file, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: is torn, or is no {file.kind} file: {error}") from None


class UnitReader:
    """Reads units of these files, best in their order. Not for several threads at a time.

    A line of text has its number as its id, from 1; where there are several text files, FILE:NUMBER.
    """

    def __init__(self, files: Sequence[InputFile], columns: Columns) -> None:
        self._files, self._columns = files, columns
        self._names_lines = sum(file.kind == "text" for file in files) > 1
        self._open: tuple[int, _Lines | _ParquetRows] | None = None

    def read(self, unit: Unit) -> UnitRows:
        """The rows of a unit. Raises UnreadableError, which names a file that is torn, or was changed since."""
        file = self._files[unit.file]
        try:
            if self._open is None or self._open[0] != unit.file or not self._open[1].reaches(unit):
                self._open = unit.file, self._opened(file, unit)
            found = self._open[1].take(unit)
            _check_unchanged(file)  # once more: what was open may have been overwritten where it lies
        except (pa.ArrowException, OSError, EOFError) as error:
            last = unit.first + unit.rows
            raise UnreadableError(f"{file}, rows {unit.first + 1} to {last}: cannot be read: {error}") from None
        return judge_rows(unit.first, found)

    def _opened(self, file: InputFile, unit: Unit) -> _Lines | _ParquetRows:
        if file.kind == "parquet":
            return _ParquetRows(file, self._columns, unit)
        return _Lines(file, self._columns, f"{file}:" if self._names_lines else "")


class _Lines:
    """A text or JSON-lines file; where it is packed, from its beginning on. The id of a line of text is its number,
    behind `prefix`."""

    def __init__(self, file: InputFile, columns: Columns, prefix: str) -> None:
        _check_unchanged(file)
        self._file, self._columns, self._prefix = file, columns, prefix
        self._stream, self._at = _open_lines(file), 0

    def reaches(self, unit: Unit) -> bool:
        return not self._file.is_packed or self._at <= unit.start

    def take(self, unit: Unit) -> list[tuple[Any, Any] | Unusable]:
        if not self._file.is_packed:
            self._stream.seek(unit.start)
            self._at = unit.start
        while self._at < unit.start:
            self._read(min(CHUNK_BYTES, unit.start - self._at))
        lines = self._read(unit.stop - unit.start).removesuffix(b"\n").split(b"\n")
        if not unit.first:
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
        lines = [line.removesuffix(b"\r") for line in lines]
        if self._file.kind == "json":
            return [parse_line(line, self._columns) for line in lines]
        return [(f"{self._prefix}{number}", decode_line(line)) for number, line in enumerate(lines, unit.first + 1)]

    def _read(self, size: int) -> bytes:
        content = self._stream.read(size)
        if len(content) < size:
            raise EOFError("it ends too early")
        self._at += size
        return content


class _ParquetRows:
    """A Parquet file from the row group on in which a unit begins."""

    def __init__(self, file: InputFile, columns: Columns, unit: Unit) -> None:
        _check_unchanged(file)
        source = file.file.filesystem.open_input_file(file.file.path)
        # Read by buffers of a page or so: a row group of a million rows is never in memory as a whole.
        parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES)
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(groups)])
        group = self._group(unit.first)
        self._columns, self._at = columns, int(self._starts[group])
        names = list(dict.fromkeys((columns.id, *columns.texts)))
        self._batches = parquet.iter_batches(unit.rows, list(range(group, len(groups))), names, use_threads=False)
        self._batch: pa.RecordBatch | None = None

    def reaches(self, unit: Unit) -> bool:
        first = unit.first
        return self._at == first or (self._at < first and self._group(first) == self._group(self._at))

    def take(self, unit: Unit) -> list[tuple[Any, Any]]:
        pairs: list[tuple[Any, Any]] = []
        while len(pairs) < unit.rows:
            if not self._batch:
                self._batch = next(self._batches, None)
                if self._batch is None:
                    raise EOFError("it ends too early")
            skipped = min(len(self._batch), unit.first + len(pairs) - self._at)
            taken = self._batch.slice(skipped, unit.rows - len(pairs))
            texts = zip(*(column_cells(taken[name]) for name in self._columns.texts), strict=True)
            pairs += zip(column_cells(taken[self._columns.id]), map(join_cells, texts), strict=True)
            self._batch = self._batch.slice(skipped + len(taken))
            self._at += skipped + len(taken)
        return pairs

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1


def _check_unchanged(file: InputFile) -> None:
    info = file.file.filesystem.get_file_info(file.file.path)
    if info.type == pafs.FileType.NotFound:
        raise UnreadableError(
            f"{file}: is not there: it was removed while the job ran, or lies where this node does not see it"
        )
    if (info.size, modified_ns(info, file.file)) != (file.size, file.modified_ns):
        raise UnreadableError(f"{file}: was changed while the job ran: leave inputs as they are until it ends")


def _open_lines(file: InputFile) -> pa.NativeFile:
    filesystem, path = file.file.filesystem, file.file.path
    if not file.is_packed:
        return filesystem.open_input_file(path)
    if not file.size:
        raise EOFError("there is no byte in it")
    return filesystem.open_input_stream(path, compression="gzip")


def _cut_parquet(file: InputFile, columns: Columns) -> CutFile:
    with file.file.filesystem.open_input_file(file.file.path) as source:
        parquet = pq.ParquetFile(source)
        metadata, schema = parquet.metadata, parquet.schema_arrow
    for name, flag in columns.flags:
        if name not in schema.names:
            raise ValueError(f"{file}: has no column {name!r}; it has {schema.names}: name one by {flag}")
        times = schema.names.count(name)
        if times > 1:
            raise ValueError(f"{file}: has {times} columns {name!r}: rename one, or name another by {flag}")
        found = schema.field(name).type
        kind = found.value_type if pa.types.is_dictionary(found) else found
        strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        nothing = pa.types.is_null(kind)  # a part of a data set in which no row has a value
        if not strings and not nothing and not (flag == "--id-column" and pa.types.is_integer(kind)):
            wanted = "strings or integers" if flag == "--id-column" else "strings"
            raise ValueError(f"{file}: the column {name!r} is {found}, not {wanted}: name another by {flag}")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = np.cumsum([0, *(group.num_rows for group in groups)], dtype=float)
    sizes = np.cumsum([0, *(_size(group, columns) for group in groups)], dtype=float)
    firsts = [0]
    while firsts[-1] < rows[-1]:
        start = np.interp(firsts[-1], rows, sizes)
        filled = max(firsts[-1] + 1, math.ceil(np.interp(start + UNIT_BYTES, sizes, rows)))
        firsts.append(min(firsts[-1] + UNIT_ROWS, filled))
    return CutFile(file, np.array(firsts), np.empty(0, np.int64))


def _size(group: pq.RowGroupMetaData, columns: Columns) -> int:
    """Bytes of a row group in these columns."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(one.total_uncompressed_size for one in chunks if one.path_in_schema in (columns.id, *columns.texts))


def _cut_lines(file: InputFile, columns: Columns) -> CutFile:
    firsts, starts, lines, at, last = [0], [0], 0, 0, b""
    try:
        with _open_lines(file) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                if not at and chunk.startswith(UTF_16):  # most of its lines are UTF-8, too: a NUL beside each letter
                    raise ValueError(f"{file}: is UTF-16, by its first two bytes: save it as UTF-8")
                if not at and file.kind == "json":
                    _look(file, chunk, columns)
                ends = at + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE)
                while (taken := _lines_left(ends, firsts[-1] - lines, starts[-1])) <= len(ends):
                    firsts.append(lines + taken)
                    starts.append(int(ends[taken - 1]))
                lines, at, last = lines + len(ends), at + len(chunk), chunk[-1:]
    except EOFError as error:
        raise OSError(str(error)) from None
    if at > starts[-1]:
        firsts.append(lines + (last != b"\n"))
        starts.append(at)
    return CutFile(file, np.array(firsts), np.array(starts))


def _lines_left(ends: np.ndarray, first: int, start: int) -> int:
    """How many of the lines that end at these bytes belong to the unit that begins at line `first` (the first of these
    is 0) and at byte `start`; more than there are where it goes on behind them."""
    return min(first + UNIT_ROWS, int(np.searchsorted(ends, start + UNIT_BYTES)) + 1)


def _look(file: InputFile, chunk: bytes, columns: Columns) -> None:
    """Raise ValueError where the file's first lines are no objects, or none of them has one of the columns: then it is
    the wrong file, or the column was named wrongly. Rows in which a column is null may lack it."""
    lines = chunk.removeprefix(BYTE_ORDER_MARK).split(b"\n")
    if len(chunk) == CHUNK_BYTES:
        lines.pop()  # it may go on
    unseen, first = {columns.id, *columns.texts}, None
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            first = first or row
            unseen.difference_update(row)
            if not unseen:
                return
    if first is None:
        if lines:
            raise ValueError(f"{file}: is no JSON-lines file: none of its first {len(lines):,} lines is an object")
        return
    name, flag = next((name, flag) for name, flag in columns.flags if name in unseen)
    raise ValueError(f"{file}: no line has {name!r}; the first has {sorted(first)}: name one by {flag}")
