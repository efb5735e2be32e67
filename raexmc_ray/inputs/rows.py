"""Rows of input files: which of them can be used, and what is wrong with the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Columns:
    """Where the id and the text of a row stand. A text of several columns is theirs, joined by a space, as that of a
    corpus of several fields is; those that a row has not are passed over."""

    id: str = "id"
    texts: tuple[str, ...] = ("text",)

    @property
    def flags(self) -> list[tuple[str, str]]:
        """(column, the option that names it) of each."""
        return [(self.id, "--id-column"), *((name, "--text-column") for name in self.texts)]


class Rejected(NamedTuple):
    """A row that cannot be used: its number in the file, from 1, its id where it has one, and why."""

    row: int
    id: str | None
    reason: str


@dataclass(frozen=True)
class UnitRows:
    """The rows of a unit in their order: those that can be used (number in the file, from 1, id, text), and others."""

    numbers: list[int]
    ids: list[str]
    texts: list[str]
    rejected: list[Rejected]


def encode_rows(rows: UnitRows, encode: Callable[[list[str]], np.ndarray]) -> tuple[UnitRows, np.ndarray]:
    """(the rows that can be encoded, with the others among the rejected ones; their embeddings [rows, d], finite).

    rows: with one text at least. What the encoder raises is raised where it is no text's fault: where each of them can
    be encoded alone, or any other text fails, too; so is what memory and files raise.
    """
    reasons: dict[int, str] = {}
    kept = list(range(len(rows.texts)))
    try:
        vectors_ND = encode(rows.texts)
    except Exception:
        wrong = failures(rows.texts, encode)
        reasons = {row: f"the encoder fails on the text ({type(error).__name__})" for row, error in wrong}
        kept = [row for row in kept if row not in reasons]
        if not reasons:
            raise
        vectors_ND = encode([rows.texts[row] for row in kept]) if kept else encode(["any text"])[:0]
    finite = np.isfinite(vectors_ND).all(1)
    for place in np.flatnonzero(~finite).tolist():
        reasons[kept[place]] = "the encoder's embedding of the text is not finite"
    if not reasons:
        return rows, vectors_ND
    broken = [Rejected(rows.numbers[row], rows.ids[row], reason) for row, reason in reasons.items()]
    kept = [row for row in kept if row not in reasons]
    numbers, ids, texts = [rows.numbers[i] for i in kept], [rows.ids[i] for i in kept], [rows.texts[i] for i in kept]
    return UnitRows(numbers, ids, texts, sorted([*rows.rejected, *broken])), vectors_ND[finite]


def failures(texts: Sequence[str], encode: Callable[[list[str]], np.ndarray]) -> Iterator[tuple[int, Exception]]:
    """(its place, what is raised) of each text that cannot be encoded, alone."""
    for place, text in enumerate(texts):
        try:
            encode([text])
        except (MemoryError, OSError):
            raise
        except Exception as error:
            yield place, error


class Unusable(NamedTuple):
    """Stands where a value must stand, and says what is there: why the row cannot be used."""

    what: str


MISSING, NULL, NO_UTF8 = Unusable("is missing"), Unusable("is null"), Unusable("is not UTF-8")


def judge_rows(first: int, found: Iterable[tuple[Any, Any] | Unusable]) -> UnitRows:
    """Rows (id, text) from row `first` on, sorted into those that can be used and the others."""
    rows = UnitRows([], [], [], [])
    for number, row in enumerate(found, first + 1):
        if isinstance(row, Unusable):
            rows.rejected.append(Rejected(number, None, f"the line {row.what}"))
            continue
        id_, text = row
        if isinstance(id_, int) and not isinstance(id_, bool):
            id_ = str(id_)
        wrong_id, wrong_text = _wrong(id_), _wrong(text)
        if wrong_id:
            rows.rejected.append(Rejected(number, None, f"the id {wrong_id}"))
        elif wrong_text:
            rows.rejected.append(Rejected(number, id_, f"the text {wrong_text}"))
        else:
            rows.numbers.append(number)
            rows.ids.append(id_)
            rows.texts.append(text)
    return rows


def _wrong(value: Any) -> str | None:
    """What is wrong with an id or a text; None where nothing is."""
    if value is None:
        return NULL.what
    if isinstance(value, Unusable):
        return value.what
    if not isinstance(value, str):
        return f"is no string, but {type(value).__name__}"
    if not value.strip():
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return NO_UTF8.what
    return None


def parse_line(line: bytes, columns: Columns) -> tuple[Any, Any] | Unusable:
    """(id, text) of a line of JSON, as they stand there."""
    text = decode_line(line)
    if isinstance(text, Unusable):
        return text
    if not text.strip():
        return Unusable("is empty")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return Unusable("is not JSON")
    if not isinstance(row, dict):
        return Unusable("is no JSON object")
    return row.get(columns.id, MISSING), join_cells([row.get(name, MISSING) for name in columns.texts])


def join_cells(cells: Sequence[Any]) -> Any:
    """The text of these cells of a row; where it has none, the first of what stands in its place."""
    texts = [cell for cell in cells if cell is not None and cell != "" and cell is not MISSING]
    wrong = [text for text in texts if not isinstance(text, str)]
    return wrong[0] if wrong else " ".join(texts) if texts else cells[0]


def decode_line(line: bytes) -> str | Unusable:
    """The text of bytes that should be UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return NO_UTF8


def column_cells(column: pa.Array) -> list[Any]:
    """The values of a Parquet column; its strings may be anything, since nobody has looked at them yet."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [decode_line(cell) if cell is not None else None for cell in column.cast(pa.binary()).to_pylist()]
