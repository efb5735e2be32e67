"""What an evaluation leaves: a JSON file for people and programs, and beside it the figures of every row.

The JSON has one shape wherever it is written. The rows are in a Parquet file, which the JSON names with its size and
checksum: sixty numbers a row would make a JSON of a gigabyte out of a million rows, and Parquet's dictionaries and
compression make about a hundred bytes a row of them (most figures of a row take few different values). Its name has its
checksum in it, so that the JSON, which is written last and in one step, always names rows that are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from raexmc_ray.files import FileEntry, Folder, describe_bytes
from raexmc_ray.recipe import METRICS, PredictionSection

FORMAT_VERSION = 1
EVALUATION = "evaluation.json"
ROW, BEST_ROW = "row", "best"

Table = dict[str, dict[str, float]]


class Result(BaseModel):
    """A part of an evaluation: closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LabelGroup(Result):
    """Labels of like frequency, and what was found of them."""

    labels: int
    """Labels in the group."""
    most: int
    """Training instances of its most frequent label."""
    least: int
    """Training instances of its rarest label."""
    pairs: int
    """Pairs of an evaluated row and a label of the group that is relevant to it."""
    precision: dict[str, float]
    """{row of the table: its part of P@k in percent}; the parts of all groups add up to P@k."""
    recall: dict[str, float]
    """{row of the table: percent of the pairs that are found among the first k}; nothing where there is no pair."""


class Breakdown(Result):
    """Which labels the first k predictions get right, by label frequency, the most frequent first. Each group has an
    equal share of the training pairs, as far as whole labels allow."""

    k: int
    thirds: list[LabelGroup]
    """Head, torso and tail."""
    tenths: list[LabelGroup]
    """Deciles of the training pairs."""
    covered: dict[str, dict[str, float]]
    """{row of the table: {"predicted": percent of all labels that are predicted for some row, "found": percent of the
    labels relevant to some row that are right at least once}}, among the first k."""


class RowsFile(FileEntry):
    """The Parquet file with the figures of every row."""

    name: str
    """Of the file, which lies beside the JSON."""


class Evaluation(Result):
    """How good a memory or a file of predictions is on the rows of a test part."""

    format_version: int = FORMAT_VERSION
    created: str
    """UTC, ISO 8601."""
    snapshot: str | None
    """The snapshot that answered; nothing where predictions do not say it."""
    corpus: str
    """Fingerprint of the corpus: its training part and labels."""
    test: str
    """Fingerprint of the rows that were measured: uids, relevance and filter pairs."""
    evaluated: int
    """Rows that have a label."""
    excluded: int
    """Rows without a label, which are in no figure."""
    settings: PredictionSection | None
    """Of the row "both"; nothing where predictions do not say them."""
    propensity_a: float
    propensity_b: float
    table: Table
    """{row: {metric: percent}}."""
    breakdown: Breakdown
    seconds: dict[str, float]
    """{stage: seconds}, all rows together."""
    recipe: dict[str, Any] | None = None
    """The recipe of what was measured: `encoder`, `training` and `memory` are what the memory was built from, left out
    where that is not known; `corpus` and `cluster` are those of the run that measured."""
    rows: RowsFile | None = None
    """Where the figures of every row are."""


@dataclass(frozen=True)
class Measured:
    """An evaluation with the figures of its rows.

    rows: int64, places in the test part. figures: {"ROW/METRIC": float64 [R]}, a row of the table each, and
    {"best/METRIC": …}, what the best possible ranking has.
    """

    evaluation: Evaluation
    rows: np.ndarray
    figures: dict[str, np.ndarray]

    @property
    def table(self) -> Table:
        return self.evaluation.table

    def save(self, folder: Folder, name: str = EVALUATION) -> Evaluation:
        """Write both files into `folder`, and remove the rows that the JSON named before, unless another JSON there
        names them, too: a copy of it. Gives what was written."""
        file = folder / name
        before = None if file.size() is None else _rows_named(file)
        columns = {ROW: pa.array(self.rows)} | {name: pa.array(values) for name, values in self.figures.items()}
        sink = BytesIO()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        entry = describe_bytes(sink.getvalue())
        rows = RowsFile(name=f"{name.removesuffix('.json')}-{entry.sha256[:12]}.parquet", **entry.model_dump())
        (folder / rows.name).write(sink.getvalue())
        written = self.evaluation.model_copy(update={"rows": rows})
        file.write(written.model_dump_json(indent=2, by_alias=True).encode() + b"\n")
        if before and not _is_named(before, folder):
            (folder / before).remove_file()
        return written


def load(path: Folder) -> Measured:
    """An evaluation and its rows from its JSON file. Raises FileNotFoundError, ValueError that names the file."""
    evaluation = _read(path)
    if evaluation.rows is None:
        raise ValueError(f"{path}: names no file of rows: run `raexmc evaluate` again")
    file = path.parent / evaluation.rows.name
    if file.size() is None:
        raise FileNotFoundError(f"{file}: is missing; {path} names it, and needs it beside it: copy it there, too")
    content = file.read()
    if describe_bytes(content).sha256 != evaluation.rows.sha256:
        raise ValueError(f"{file}: is torn or altered: its sha256 is not what {path} says")
    # In this thread: Arrow's own may hold Python's bytes when the process ends, which aborts it (arrow#34314).
    table = pq.read_table(pa.BufferReader(content), use_threads=False, pre_buffer=False)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return Measured(evaluation, columns.pop(ROW), columns)


def _read(path: Folder) -> Evaluation:
    if path.size() is None:
        raise FileNotFoundError(f"no evaluation at {path}: give the JSON file that `raexmc evaluate` wrote")
    try:
        evaluation = Evaluation.model_validate_json(path.read())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{path}: is no evaluation of this raexmc_ray: {where}: {problem['msg']}") from None
    if evaluation.format_version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {evaluation.format_version}; this raexmc_ray reads up to {FORMAT_VERSION}"
        )
    return evaluation


def _rows_named(path: Folder) -> str | None:
    """The name of the rows that the JSON at `path` names; nothing where it is no evaluation."""
    try:
        rows = _read(path).rows
    except ValueError:
        return None
    return rows.name if rows else None


def _is_named(rows: str, folder: Folder) -> bool:
    """Whether a JSON in `folder` names these rows."""
    files = (folder / name for name in folder.names() if name.endswith(".json"))
    return any(rows.encode() in file.read() for file in files if file.size())


def format_table(table: Mapping[str, Mapping[str, float]], names: Sequence[str] | None = None) -> str:
    """The table as aligned text, a row a line, in percent: METRICS, unless other names are given. A metric that could
    not be computed is left out where no row has it, and is a dash elsewhere."""
    names = [name for name in names or METRICS if any(name in figures for figures in table.values())]
    widths = [max(len(name), 5) for name in names]
    first = max(len(row) for row in table)
    lines = [" " * first + "  " + "  ".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))]
    for row, figures in table.items():
        cells = (f"{figures[n]:>{w}.2f}" if n in figures else f"{'–':>{w}}" for n, w in zip(names, widths, strict=True))
        lines.append(f"{row:<{first}}  {'  '.join(cells)}")
    return "\n".join(lines)
