"""Text files line by line: plain or gzip, checked to be whole and clean."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from raexmc_ray.corpus.types import CorpusError
from raexmc_ray.progress import Progress

TOLD_EVERY = 4096
"""Lines between two looks at how far a file is read."""


def is_there(path: Path) -> bool:
    """Whether there is a file at this path. A folder, as Spark writes one in a file's stead, is refused: passed over,
    all its rows would be missing in silence."""
    if path.is_dir():
        raise CorpusError(path, "is a folder, and must be one file: write its parts into one")
    return path.is_file()


def find(folder: Path, name: str) -> Path | None:
    """`folder/name`, or its gzip, or None. Both at once is ambiguous, and refused."""
    found = [path for path in (folder / name, folder / f"{name}.gz") if is_there(path)]
    if len(found) > 1:
        raise CorpusError(found[0], f"{found[1].name} is there too: keep one of the two")
    return found[0] if found else None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 text file, gzip where the name ends in .gz; a byte order
    mark is left out. A line of progress, by the bytes of the file, tells of a long one.

    Raises CorpusError at a NUL byte, at bytes that are not UTF-8, and where the gzip stream is cut short.
    """
    number = 0
    try:
        if path.suffix == ".gz" and not path.stat().st_size:
            raise EOFError("there is no byte in it")  # gzip takes it for an empty text
        size, told = path.stat().st_size, 0
        with (
            path.open("rb") as opened,
            _unpacked(path, opened) as file,
            Progress(f"read {path.name}", size, "bytes", if_long=True) as progress,
        ):
            for number, raw in enumerate(file, 1):
                if number % TOLD_EVERY == 0:
                    told, before = opened.tell(), told
                    progress.add(told - before)
                if b"\0" in raw:
                    raise CorpusError(path, "there is a NUL byte: the file is damaged", line=number)
                try:
                    yield number, raw.decode("utf-8" if number > 1 else "utf-8-sig").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        path,
                        f"invalid UTF-8 at byte {error.start + 1} of the line ({error.reason}): "
                        "convert the file to UTF-8",
                        line=number,
                    ) from None
            progress.add(size - told)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(
            path, f"the gzip stream is cut short or damaged ({error}): copy the file again", line=number + 1
        ) from None
    except OSError as error:
        raise CorpusError(path, f"cannot be read: {error.strerror or error}") from None


GIVE_A_TEXT = (
    "give the row a text, or drop it if it is no label's (a label that has none may have its uid: were its row "
    "dropped, each label behind it would be taken for the one before)"
)


def check_text(path: Path, line: int, field: str, text: str) -> str:
    """`text`, unless it is empty, blank or carries a NUL."""
    if "\0" in text:
        raise CorpusError(path, "there is a NUL byte in the text: remove it", line=line, field=field)
    if not text.strip():
        raise CorpusError(path, f"the text is empty: {GIVE_A_TEXT}", line=line, field=field)
    return text


class UniqueUids:
    """Refuses a uid that came before in the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: dict[str, int] = {}

    def add(self, line: int, uid: str) -> None:
        if not uid:
            raise CorpusError(self._path, "the uid is empty", line=line, field="uid")
        first = self._first.setdefault(uid, line)
        if first != line:
            raise CorpusError(
                self._path,
                f"duplicate uid {uid!r}, first on line {first}: uids are unique in a file",
                line=line,
                field="uid",
            )


def read_pairs(path: Path | None, rows: int, columns: int) -> tuple[list[int], list[int]]:
    """The pairs of a filter file: lines "row label", from 0. No file, no pairs; repeats count once."""
    if path is None:
        return [], []
    pairs: dict[tuple[int, int], None] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        parts = line.split()
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise CorpusError(path, f"expected 'row label', two integers; found {line[:60]!r}", line=number)
        pair = int(parts[0]), int(parts[1])
        for value, bound, field in zip(pair, (rows, columns), ("row", "label"), strict=True):
            if value >= bound:
                raise CorpusError(
                    path,
                    f"{value} is out of range: there are {bound:,} {field}s, numbered from 0",
                    line=number,
                    field=field,
                )
        pairs[pair] = None
    return [row for row, _ in pairs], [label for _, label in pairs]


def _unpacked(path: Path, file: BinaryIO) -> IO[bytes]:
    """The bytes of an open file; of a gzip, those that are packed in it."""
    return gzip.open(file, "rb") if path.suffix == ".gz" else file  # type: ignore[return-value]  # a GzipFile is no BinaryIO
