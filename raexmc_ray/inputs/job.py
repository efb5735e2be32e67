"""A job over input files, on disk: what it computes, which of its parts are there, and what came of it.

    OUTPUT/
      job.json                              what is computed; written before the work begins
      PARTS/part-FFFFF-UUUUUU.parquet       unit U of the F-th input file; `pq.read_table("OUTPUT/PARTS")`
      rejected/part-FFFFF-UUUUUU.parquet    its rows that could not be used, and why; only where there are some
      summary.json                          the counts; written last: where it is, all of the output is there

A job is what job.json says: its settings and columns, and each input file's name, size and time of last change, for
which no byte of it is read. The same job on the same OUTPUT goes on; another one is refused, and so are parts that are
none of the job's. A unit is read, worked on and written by whoever gets it, in one atomic step: nobody holds the rows
of all. What a kind of job computes is a subclass of `Job`; what it makes of a unit, one of `UnitWorker`.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from raexmc_ray.files import Folder
from raexmc_ray.inputs.find import InputFile, Written, find_inputs
from raexmc_ray.inputs.rows import Columns, Rejected, UnitRows
from raexmc_ray.inputs.units import UNIT_BYTES, UNIT_ROWS, CutFile, Unit, UnitReader, UnreadableError, cut_files
from raexmc_ray.progress import Progress

JOB, SUMMARY, REJECTED = "job.json", "summary.json", "rejected"
FORMAT_VERSION = 2
BLOCKS = 4096
"""Pieces of work that are handed out at most: a unit each, or several in a row where there are more units."""
REJECTED_ROWS = pa.schema({"file": pa.string(), "row": pa.int64(), "id": pa.string(), "reason": pa.string()})
"""A row that could not be used, by its number in its file, from 1."""


class JobInput(BaseModel):
    """An input file as it was when the job began."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    size: int
    modified_ns: int
    """Nanoseconds since the epoch; object stores tell seconds."""


class Job(BaseModel):
    """What is computed: a run with an equal job takes the parts that are there."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    PARTS: ClassVar[str]
    """The folder of its parts."""
    VERB: ClassVar[str]
    """What it does with a row."""
    format_version: int = FORMAT_VERSION
    id_column: str
    text_columns: tuple[str, ...]
    unit_rows: int = UNIT_ROWS
    unit_bytes: int = UNIT_BYTES
    inputs: list[JobInput]

    @classmethod
    def over(cls, files: Sequence[InputFile], columns: Columns, **settings: Any) -> Self:
        """This kind of job over these files, as they are now."""
        inputs = [JobInput(file=str(file), size=file.size, modified_ns=file.modified_ns) for file in files]
        return cls(id_column=columns.id, text_columns=columns.texts, inputs=inputs, **settings)

    @property
    def columns(self) -> Columns:
        return Columns(self.id_column, self.text_columns)

    @classmethod
    def written(cls) -> tuple[str, ...]:
        """All that such a job writes that an input could be taken for, as patterns of names."""
        return JOB, SUMMARY, f"{cls.PARTS}/part-*.parquet", f"{REJECTED}/part-*.parquet"

    @classmethod
    def remedy(cls) -> str:
        return f"give another --output, or remove {JOB}, {SUMMARY}, {cls.PARTS} and {REJECTED} from that folder"

    def how_to_go_on(self, before: Self) -> str:
        """Said of another job's output, where an option would make it the same."""
        return ""

    def difference(self, before: Self) -> str | None:
        """The first thing in which this is another job than `before`; None where it is the same."""
        for name in type(self).model_fields:
            was, now = getattr(before, name), getattr(self, name)
            if was != now and name != "inputs":
                return f"{name} was {was!r}, and is {now!r}"
        was, now = ({file.file: file for file in job.inputs} for job in (before, self))
        for file in sorted(was.keys() | now.keys()):
            if was.get(file) != now.get(file):
                return (
                    f"the input {file} {'is new' if file not in was else 'is gone' if file not in now else 'changed'}"
                )
        return None


class Run(BaseModel):
    """How long a run took, from its first look at the output."""

    rows: int
    seconds: float
    rows_per_s: float


class Summary(BaseModel):
    """What came of a job."""

    rows: int
    results: int
    """Rows that have one in some part."""
    rejected: dict[str, int]
    """Rows that could not be used, by the reason."""
    files: int
    parts: int
    last_run: Run
    """The last run that had something to do. All else in the output is the same whatever happened to the job."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())
        rejected = f", {sum(self.rejected.values()):,} rejected ({reasons})" if reasons else ""
        return f"{self.results:,} of {self.rows:,} rows{rejected}, {self.last_run.rows_per_s:,.1f} rows/s"


@dataclass(frozen=True)
class Task:
    """What every worker of a job is told."""

    output: Folder
    files: list[InputFile]
    job: Job

    @property
    def parts(self) -> Folder:
        return self.output / self.job.PARTS


class UnitWorker(ABC):
    """A worker of a job: reads units, and writes a part for each."""

    ENDS_THE_JOB: ClassVar[tuple[type[Exception], ...]] = (UnreadableError,)
    """Errors that say by themselves what is wrong."""
    VALUES_COME_AGAIN: ClassVar[bool] = True
    """In the columns of a part, so that dictionaries of them save bytes."""

    def __init__(self, task: Task) -> None:
        """What `open` raises is for a call to say: Ray Data makes a trace of what is raised here."""
        self.task, self._of_thread, self._refused = task, threading.local(), ""
        try:
            self.open()
        except (ValueError, OSError) as error:
            self._refused = str(error)

    @abstractmethod
    def open(self) -> None:
        """Make ready what `part_of` needs. Raises ValueError and OSError for what ends the job."""

    @abstractmethod
    def part_of(self, rows: UnitRows) -> tuple[pa.Table, list[Rejected]]:
        """The part of a unit with these rows, and those rows that are not in it, in their order. May be called by
        several threads at a time."""

    def __call__(self, units: pa.Table) -> dict[str, np.ndarray]:
        """{"rows": [how many are done]} of units (their fields), or {"error": [what ends the job]}."""
        if self._refused:
            return {"error": np.array([self._refused])}
        try:
            rows = [self._do(Unit(**unit)) for unit in units.to_pylist()]
        except self.ENDS_THE_JOB as error:
            return {"error": np.array([str(error)])}
        except OSError as error:  # no space, no rights, a store that does not answer
            return {"error": np.array([f"{self.task.output}: cannot be written, or its inputs read: {error}"])}
        return {"rows": np.array([sum(rows)])}

    def _do(self, unit: Unit) -> int:
        task, name = self.task, part_name(unit.file, unit.number)
        if (task.parts / name).size() is not None:  # by a worker that died before it could say so
            return unit.rows
        metadata = {
            "settings": task.job.model_dump_json(by_alias=True, exclude={"inputs"}),
            "input": task.job.inputs[unit.file].model_dump_json(),
            "first_row": str(unit.first + 1),
        }
        part, rejected = self.part_of(self._reader.read(unit))
        if rejected:  # before the part: a unit is done once that is there
            rows = [{"file": str(task.files[unit.file]), **row._asdict()} for row in rejected]
            table = pa.Table.from_pylist(rows, REJECTED_ROWS.with_metadata(metadata))
            _write(task.output / REJECTED / name, table)
        else:  # of a worker that died between its two writes, and whose encoder failed
            (task.output / REJECTED / name).remove_file()
        part = part.replace_schema_metadata({**(part.schema.metadata or {}), **metadata})
        _write(task.parts / name, part, self.VALUES_COME_AGAIN)
        return unit.rows

    @property
    def _reader(self) -> UnitReader:
        """This thread's own, with its own place in a file."""
        if not hasattr(self._of_thread, "reader"):
            self._of_thread.reader = UnitReader(self.task.files, self.task.job.columns)
        return self._of_thread.reader


def find_files(inputs: Sequence[str], output: Folder, kind: type[Job]) -> list[InputFile]:
    """What `find_inputs` finds, without what such a job writes under `output`, which may lie among the inputs."""
    return find_inputs(inputs, Written(output, kind.written()))


def run_job(task: Task, work: Callable[[list[pa.Table]], Iterator[int]]) -> Summary:
    """Do what is missing of a job, and count what is there.

    work: given units that are missing (tables of their fields, in pieces), it gives the rows done as they are done.
    Raises ValueError before that where an input cannot be read or has not these columns, and where the output is
    another job's.
    """
    started, output, job = time.monotonic(), task.output, task.job
    is_new = check_output(output, job)
    cut = cut_files(task.files, job.columns)
    total = sum(part.rows for part in cut)
    if not total:
        raise ValueError(f"{', '.join(map(str, task.files[:3]))}: there is no row in it: nothing to do")
    if is_new and check_output(output, job):  # a job that was refused leaves nothing behind; cutting may take long
        (output / JOB).write(job.model_dump_json(indent=1, by_alias=True).encode() + b"\n")
    units = missing_units(task, cut)
    if not len(units) and (output / SUMMARY).size() is not None:
        return Summary.model_validate_json((output / SUMMARY).read())
    done = 0
    if len(units):
        (output / SUMMARY).remove_file()
        todo, size = int(np.sum(units["rows"])), math.ceil(len(units) / BLOCKS)
        with Progress(job.VERB, total, "rows", done=total - todo) as progress:
            for rows in work([units.slice(start, size) for start in range(0, len(units), size)]):
                done += rows
                progress.add(rows)
    return summarise(task, cut, done, time.monotonic() - started)


def check_output(output: Folder, job: Job) -> bool:
    """Whether this job is the first on `output`. Raises ValueError where that is another job's."""
    if (output / JOB).size() is None:
        foreign = [kind for kind in (job.PARTS, REJECTED) if (output / kind).names()]
        if (output / SUMMARY).size() is not None:
            foreign.append(SUMMARY)
        if foreign:
            raise ValueError(f"{output}: there is {' and '.join(foreign)} in it, but no {JOB}: {job.remedy()}")
        return True
    try:
        before = type(job).model_validate_json((output / JOB).read())
    except ValueError:
        raise ValueError(
            f"{output / JOB}: is torn, of another kind of job, or of another version of raexmc_ray: {job.remedy()}"
        ) from None
    difference = job.difference(before)
    if difference:
        raise ValueError(f"{output}: is of another job: {difference}: {job.remedy()}{job.how_to_go_on(before)}")
    return False


def part_name(file: int, unit: int) -> str:
    """The name of the part of the unit-th unit of the file-th file."""
    return f"part-{file:05d}-{unit:06d}.parquet"


def missing_units(task: Task, cut: Sequence[CutFile]) -> pa.Table:
    """The units (fields of `Unit`) that have no part yet. Raises ValueError where there is a part of no unit."""
    folders = task.parts, task.output / REJECTED
    there, rejected = (
        {name for name in folder.names() if not name.startswith(".")}  # those are half-written
        for folder in folders
    )
    done = frozenset(there)
    tables = []
    for file, part in enumerate(cut):
        names = [part_name(file, number) for number in range(part.units)]
        tables.append(part.table(file, np.flatnonzero([name not in done for name in names])))
        there.difference_update(names)
        rejected.difference_update(names)
    for folder, foreign in zip(folders, (there, rejected), strict=True):
        if foreign:
            raise ValueError(f"{folder / min(foreign)}: is none of this job's parts: move it away")
    return pa.concat_tables(tables).combine_chunks()


def summarise(task: Task, cut: Sequence[CutFile], done: int, seconds: float) -> Summary:
    """Count what is there, and write it down. done, seconds: rows of this run, and the time that they took."""
    output = task.output
    missing = missing_units(task, cut)
    if len(missing):
        raise ValueError(f"{output}: {len(missing)} parts were removed while the job ran: run the same command again")
    for folder in (task.parts, output / REJECTED):
        folder.remove_half_written("part-")
    reasons = _count_reasons(output)
    rows = sum(part.rows for part in cut)
    summary = Summary(
        rows=rows,
        results=rows - reasons.total(),
        rejected=dict(sorted(reasons.items())),
        files=len(cut),
        parts=sum(part.units for part in cut),
        last_run=Run(rows=done, seconds=round(seconds, 2), rows_per_s=round(done / seconds, 2)),
    )
    (output / SUMMARY).write(summary.model_dump_json(indent=2).encode() + b"\n")
    return summary


def _count_reasons(output: Folder) -> Counter[str]:
    """The rejected rows by their reason: from their parts, which Arrow reads several at a time."""
    reasons: Counter[str] = Counter()
    folder = output / REJECTED
    paths = [(folder / name).path for name in folder.names() if not name.startswith(".")]
    if paths:
        parts = pads.dataset(paths, pa.schema({"reason": pa.string()}), "parquet", output.filesystem)
        with Progress("count the rejected rows", len(paths), "parts") as progress:
            for part in parts.to_batches():  # a part is one batch: it has the rows of a unit
                reasons.update(part["reason"].to_pylist())
                progress.add(1)
    return reasons


def _write(file: Folder, table: pa.Table, dictionaries: bool = True) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=dictionaries)
    file.write(sink.getvalue())
