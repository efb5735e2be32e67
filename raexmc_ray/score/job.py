"""A scoring job on disk: what it computes, which of its parts are there, and what came of it. `run.py` does it.

    OUTPUT/
      job.json                              what is computed; written before the work begins
      predictions/part-FFFFF-UUUUUU.parquet    unit U of the F-th input file; `pq.read_table("OUTPUT/predictions")`
      rejected/part-FFFFF-UUUUUU.parquet    its rows that could not be scored, and why; only where there are some
      summary.json                          the counts; written last: where it is, all of the output is there

A job is what job.json says: its snapshot, settings and columns, and each input file's name, size and time of last
change, for which no byte of it is read. The same job on the same OUTPUT goes on; another one is refused, and so are
parts that are none of the job's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pydantic import BaseModel, ConfigDict

from raexmc_ray.files import Folder
from raexmc_ray.inputs.units import CutFile
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import Precision, PredictionSection

JOB, SUMMARY, PREDICTED, REJECTED = "job.json", "summary.json", "predictions", "rejected"
WRITTEN = (JOB, SUMMARY, f"{PREDICTED}/part-*.parquet", f"{REJECTED}/part-*.parquet")
"""All that a job writes, as patterns of names."""
FORMAT_VERSION = 1
REMEDY = f"give another --output, or remove {JOB}, {SUMMARY}, {PREDICTED} and {REJECTED} from that folder"


class JobInput(BaseModel):
    """An input file as it was when the job began."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    size: int
    modified_ns: int
    """Nanoseconds since the epoch; object stores tell seconds."""


class Job(BaseModel):
    """What is computed: equal jobs have equal predictions."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int = FORMAT_VERSION
    snapshot: str
    settings: PredictionSection
    evidence: int
    """Keys named for each label."""
    id_column: str
    text_columns: tuple[str, ...]
    unit_rows: int
    unit_bytes: int
    precision: Precision
    device: str
    """What encodes: a GPU, or a CPU with so many threads: another may round otherwise."""
    inputs: list[JobInput]

    def difference(self, before: Job) -> str | None:
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
    """How long a run took."""

    rows: int
    seconds: float
    rows_per_s: float


class Summary(BaseModel):
    """What came of a job."""

    rows: int
    scored: int
    rejected: dict[str, int]
    """Rows that could not be scored, by the reason."""
    files: int
    parts: int
    snapshot: str
    settings: PredictionSection
    evidence: int
    last_run: Run
    """The last run that had something to do. All else in the output is the same whatever happened to the job."""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())
        rejected = f", {sum(self.rejected.values()):,} rejected ({reasons})" if reasons else ""
        return f"{self.scored:,} of {self.rows:,} rows scored{rejected}, {self.last_run.rows_per_s:,.1f} rows/s"


def check_output(output: Folder, job: Job) -> bool:
    """Whether this job is the first on `output`. Raises ValueError where that is another job's."""
    if (output / JOB).size() is None:
        foreign = [kind for kind in (PREDICTED, REJECTED) if (output / kind).names()]
        if (output / SUMMARY).size() is not None:
            foreign.append(SUMMARY)
        if foreign:
            raise ValueError(f"{output}: there is {' and '.join(foreign)} in it, but no {JOB}: {REMEDY}")
        return True
    try:
        before = Job.model_validate_json((output / JOB).read())
    except ValueError:
        raise ValueError(f"{output / JOB}: is torn, or of another version of raexmc_ray: {REMEDY}") from None
    difference = job.difference(before)
    if difference:
        goes_on = f" (--snapshot {before.snapshot} goes on with that job)" if before.snapshot != job.snapshot else ""
        raise ValueError(f"{output}: is of another job: {difference}: {REMEDY}{goes_on}")
    return False


def part_name(file: int, unit: int) -> str:
    """The name of the part of the unit-th unit of the file-th file."""
    return f"part-{file:05d}-{unit:06d}.parquet"


def missing_units(output: Folder, cut: Sequence[CutFile]) -> pa.Table:
    """The units (fields of `Unit`) that have no part yet. Raises ValueError where there is a part of no unit."""
    predicted, rejected = (
        {name for name in (output / kind).names() if not name.startswith(".")}  # those are half-written
        for kind in (PREDICTED, REJECTED)
    )
    done = frozenset(predicted)
    tables = []
    for file, part in enumerate(cut):
        names = [part_name(file, number) for number in range(part.units)]
        tables.append(part.table(file, np.flatnonzero([name not in done for name in names])))
        predicted.difference_update(names)
        rejected.difference_update(names)
    for kind, foreign in ((PREDICTED, predicted), (REJECTED, rejected)):
        if foreign:
            raise ValueError(f"{output / kind / min(foreign)}: is none of this job's parts: move it away")
    return pa.concat_tables(tables).combine_chunks()


def summarise(output: Folder, job: Job, cut: Sequence[CutFile], done: int, seconds: float) -> Summary:
    """Count what is there, and write it down. done, seconds: rows of this run, and the time that they took."""
    missing = missing_units(output, cut)
    if len(missing):
        raise ValueError(f"{output}: {len(missing)} parts were removed while the job ran: run the same command again")
    _sweep(output)
    reasons = _count_reasons(output)
    rows = sum(part.rows for part in cut)
    summary = Summary(
        rows=rows,
        scored=rows - reasons.total(),
        rejected=dict(sorted(reasons.items())),
        files=len(cut),
        parts=sum(part.units for part in cut),
        snapshot=job.snapshot,
        settings=job.settings,
        evidence=job.evidence,
        last_run=Run(rows=done, seconds=round(seconds, 2), rows_per_s=round(done / seconds, 2)),
    )
    (output / SUMMARY).write(summary.model_dump_json(indent=2, by_alias=True).encode() + b"\n")
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


def _sweep(output: Folder) -> None:
    """Remove what processes that were killed had begun to write; whatever else is hidden there is not ours."""
    for kind in (PREDICTED, REJECTED):
        for name in (output / kind).names():
            if name.startswith(".part-"):
                (output / kind / name).remove_file()
