"""The LF-XMC layout: JSON objects a line, as the public benchmarks come.

`trn.json[.gz]` and `tst.json[.gz]` (optional): `uid`, `title`, optional `content`, `target_ind`, optional
`target_rel`. `lbl.json[.gz]`: `uid`, `title`, optional `content`; the line number, from 0, is the label index.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from raexmc_ray.corpus.lines import UniqueUids, check_text, find, read_lines, read_pairs
from raexmc_ray.corpus.types import Corpus, CorpusError, Split, pair_matrix, text_table


class LabelRow(BaseModel):
    """A line of lbl.json. Fields that we do not know are left alone: the public files carry some."""

    model_config = ConfigDict(strict=True)
    uid: str | int
    title: str
    content: str = ""


class InstanceRow(LabelRow):
    """A line of trn.json or tst.json."""

    target_ind: list[int]
    target_rel: list[float] | None = None


Row = TypeVar("Row", bound=LabelRow)


def read(folder: Path, fields: Sequence[str]) -> Corpus:
    """The corpus in `folder`; `fields` (title, content) make up a text."""
    label_path = find(folder, "lbl.json")
    train_path = find(folder, "trn.json")
    assert label_path is not None, "the caller saw the label file"
    if train_path is None:
        raise CorpusError(folder, "trn.json[.gz] is missing: a corpus has training instances")
    uids, texts = _read_labels(label_path, fields)
    if not uids:
        raise CorpusError(label_path, "there is no label in it")
    train = _read_split(train_path, fields, len(uids), find(folder, "filter_labels_train.txt"))
    if not len(train):
        raise CorpusError(train_path, "there is no instance in it")
    test_path = find(folder, "tst.json")
    test = (
        _read_split(test_path, fields, len(uids), find(folder, "filter_labels_test.txt"))
        if test_path
        else train.take(np.arange(0))
    )
    return Corpus(train, test, text_table(uids, texts))


def _read_labels(path: Path, fields: Sequence[str]) -> tuple[list[str], list[str]]:
    uids: list[str] = []
    texts: list[str] = []
    unique, adapter = UniqueUids(path), TypeAdapter(LabelRow)
    for number, line in read_lines(path):
        row = _parse(adapter, path, number, line)
        uid = str(row.uid)
        unique.add(number, uid)
        uids.append(uid)
        texts.append(_text(path, number, row, fields))
    return uids, texts


def _read_split(path: Path, fields: Sequence[str], labels: int, filter_path: Path | None) -> Split:
    uids: list[str] = []
    texts: list[str] = []
    rows, columns = array("q"), array("q")
    unique, adapter = UniqueUids(path), TypeAdapter(InstanceRow)
    for number, line in read_lines(path):
        row = _parse(adapter, path, number, line)
        uid = str(row.uid)
        unique.add(number, uid)
        _check_targets(path, number, row, labels)
        rows.extend([len(uids)] * len(row.target_ind))
        columns.extend(row.target_ind)
        uids.append(uid)
        texts.append(_text(path, number, row, fields))
    shape = (len(uids), labels)
    filtered = pair_matrix(*read_pairs(filter_path, *shape), shape)
    return Split(text_table(uids, texts), pair_matrix(rows, columns, shape), filtered)


def _parse(adapter: TypeAdapter[Row], path: Path, number: int, line: str) -> Row:
    if not line.strip():
        raise CorpusError(path, "the line is empty: each line is a JSON object", line=number)
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "json_invalid":
            raise CorpusError(path, f"broken JSON: {problem['ctx']['error']}", line=number) from None
        field = str(problem["loc"][0]) if problem["loc"] else None
        found = f" (found {problem['input']!r:.60})" if problem["type"] != "missing" else ""
        raise CorpusError(path, f"{problem['msg']}{found}", line=number, field=field) from None


def _text(path: Path, number: int, row: LabelRow, fields: Sequence[str]) -> str:
    text = row.title if fields == ("title",) else " ".join(filter(None, (getattr(row, f) for f in fields)))
    return check_text(path, number, " and ".join(fields), text)


def _check_targets(path: Path, number: int, row: InstanceRow, labels: int) -> None:
    targets = row.target_ind
    for target in targets:
        if not 0 <= target < labels:
            what = "negative" if target < 0 else "out of range"
            raise CorpusError(
                path,
                f"label index {target} is {what}: there are {labels:,} labels, numbered from 0",
                line=number,
                field="target_ind",
            )
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise CorpusError(path, f"label index {twice} is there twice", line=number, field="target_ind")
    if row.target_rel is not None:
        if len(row.target_rel) != len(targets):
            raise CorpusError(
                path,
                f"{len(row.target_rel)} values for {len(targets)} labels in target_ind",
                line=number,
                field="target_rel",
            )
        if not all(math.isfinite(value) and value > 0 for value in row.target_rel):
            raise CorpusError(path, "relevance must be finite and above zero", line=number, field="target_rel")
