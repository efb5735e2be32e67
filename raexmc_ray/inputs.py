"""Texts to label or to embed, from Parquet, JSON-lines and text files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".json", ".jsonl", ".txt")


def read_texts(path: Path, id_column: str = "id", text_column: str = "text") -> pa.Table:
    """(id: string, text: string) of a file's rows; a text file has a text a line, and its number as the id.

    Raises ValueError that names the file, and the row and column where a text is empty.
    """
    suffix = next((s for s in SUFFIXES if path.name.removesuffix(".gz").endswith(s)), None)
    if not path.is_file() or suffix is None:
        raise ValueError(f"{path}: expected a file that exists and ends in {', '.join(SUFFIXES)} (or .gz after it)")
    try:
        table = pq.read_table(path) if suffix == ".parquet" else _read_text(path, suffix, id_column, text_column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is torn, or no {suffix} file in UTF-8: {error}") from None
    for column, flag in ((id_column, "--id-column"), (text_column, "--text-column")):
        if column not in table.column_names:
            raise ValueError(f"{path}: has no column {column!r}; it has {table.column_names}: name one by {flag}")
    table = pa.table({"id": table[id_column].cast(pa.string()), "text": table[text_column].cast(pa.string())})
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(table["text"]), ""), True)
    if pc.any(blank).as_py():
        row = int(np.flatnonzero(np.asarray(blank))[0]) + 1
        raise ValueError(f"{path}, row {row}, column {text_column!r}: the text is empty: drop the row")
    return table


def _read_text(path: Path, suffix: str, id_column: str, text_column: str) -> pa.Table:
    """The rows of a text or JSON-lines file, compressed or not."""
    with pa.input_stream(str(path), compression="detect") as stream:
        content = stream.read()
    if suffix != ".txt":
        return pyarrow.json.read_json(pa.BufferReader(content))
    texts = content.decode("utf-8").splitlines()
    return pa.table({id_column: [str(i + 1) for i in range(len(texts))], text_column: texts})


def digest_texts(table: pa.Table) -> str:
    """sha256 over the ids and texts of a table of `read_texts`."""
    digest = hashlib.sha256()
    for name in ("id", "text"):
        digest.update("\0".join(value or "" for value in table[name].to_pylist()).encode())
    return digest.hexdigest()
