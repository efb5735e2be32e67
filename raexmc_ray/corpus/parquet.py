"""The Parquet layout: `instances.parquet` (uid, text, labels list<int64>), `labels.parquet` (uid, text) and an
optional `test.parquet` with the columns of the instances. Line numbers in errors are row numbers, from 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raexmc_ray.corpus.lines import GIVE_A_TEXT, check_text, find, is_there, read_pairs
from raexmc_ray.corpus.types import Corpus, CorpusError, Split, pair_matrix

LABELS_ARE = "must be lists of integers, which are rows of labels.parquet, counted from 0"


def read(folder: Path, fields: Sequence[str]) -> Corpus:
    """The corpus in `folder`. A row has one text here, so `fields` does not apply."""
    del fields
    labels_path = folder / "labels.parquet"
    labels = _texts(labels_path, _read_table(labels_path, ("uid", "text")))
    train = _read_split(folder / "instances.parquet", len(labels), find(folder, "filter_labels_train.txt"))
    test_path = folder / "test.parquet"
    test = (
        _read_split(test_path, len(labels), find(folder, "filter_labels_test.txt"))
        if is_there(test_path)
        else train.take(np.arange(0))
    )
    return Corpus(train, test, labels)


def _read_table(path: Path, fields: Sequence[str]) -> pa.Table:
    """These columns, and no others that the file may have."""
    if not is_there(path):
        raise CorpusError(path, "is missing")
    try:
        names = pq.read_schema(path).names
        for field in fields:
            if field not in names:
                raise CorpusError(path, f"there is no such column; found {names}", field=field)
            if names.count(field) > 1:
                raise CorpusError(path, f"is the name of {names.count(field)} columns; found {names}", field=field)
        table = pq.read_table(path, columns=list(fields))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(path, f"is not a whole Parquet file ({error})") from None
    if not len(table):
        raise CorpusError(path, "there is no row in it")
    return table


def _texts(path: Path, table: pa.Table) -> pa.Table:
    """The columns uid and text of `table`, checked."""
    columns = {}
    for name in ("uid", "text"):
        try:
            column = table[name].cast(pa.string())
            column.validate(full=True)  # that it is UTF-8: nobody has looked
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise CorpusError(path, f"cannot be read as strings ({error})", field=name) from None
        if column.null_count:
            row = int(np.flatnonzero(np.asarray(column.is_null()))[0]) + 1
            remedy = GIVE_A_TEXT if name == "text" else "give the row a uid of its own"
            raise CorpusError(path, f"is null: {remedy}", line=row, field=name)
        columns[name] = column
    blank = pc.or_(pc.equal(pc.utf8_trim_whitespace(columns["text"]), ""), pc.match_substring(columns["text"], "\0"))
    for place in np.flatnonzero(np.asarray(blank)).tolist():
        check_text(path, place + 1, "text", columns["text"][place].as_py())
    for place in np.flatnonzero(np.asarray(pc.equal(columns["uid"], ""))).tolist():
        raise CorpusError(path, "the uid is empty", line=place + 1, field="uid")
    counts = pc.value_counts(columns["uid"])
    if len(counts) < len(table):
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        first, second = (1 + np.flatnonzero(np.asarray(pc.equal(columns["uid"], twice)))[:2]).tolist()
        raise CorpusError(
            path,
            f"duplicate uid {twice!r}, first on line {first}: uids are unique in a file",
            line=second,
            field="uid",
        )
    return pa.table(columns)


def _read_split(path: Path, labels: int, filter_path: Path | None) -> Split:
    table = _read_table(path, ("uid", "text", "labels"))
    texts = _texts(path, table)
    kind = table.schema.field("labels").type
    inner = getattr(kind, "value_type", kind)
    # Arrow would cast strings, too: uids that are spelled in digits would be taken for rows of the labels.
    if not (pa.types.is_integer(inner) or pa.types.is_null(inner)):
        raise CorpusError(path, f"{LABELS_ARE} (found {kind})", field="labels")
    try:
        targets = table["labels"].cast(pa.list_(pa.int64())).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CorpusError(path, f"{LABELS_ARE} ({error})", field="labels") from None
    counts = np.asarray(pc.fill_null(pc.list_value_length(targets), 0))
    rows = np.repeat(np.arange(len(table)), counts)
    nulls = np.flatnonzero(np.asarray(targets.flatten().is_null()))
    if len(nulls):
        raise CorpusError(
            path, "there is a null among the labels: leave it out", line=int(rows[nulls[0]]) + 1, field="labels"
        )
    columns = np.asarray(targets.flatten())
    outside = np.flatnonzero((columns < 0) | (columns >= labels))
    if len(outside):
        at = outside[0]
        what = "negative" if columns[at] < 0 else "out of range"
        raise CorpusError(
            path,
            f"label index {columns[at]} is {what}: there are {labels:,} labels, numbered from 0",
            line=int(rows[at]) + 1,
            field="labels",
        )
    shape = (len(table), labels)
    pairs = np.sort(rows * labels + columns)
    twice = pairs[1:][pairs[1:] == pairs[:-1]]
    if len(twice):
        row, label = divmod(int(twice[0]), labels)
        raise CorpusError(path, f"label index {label} is there twice", line=row + 1, field="labels")
    filtered = pair_matrix(*read_pairs(filter_path, *shape), shape)
    return Split(texts, pair_matrix(rows, columns, shape), filtered)
