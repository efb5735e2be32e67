"""Ray Data: label whole data sets offline, in units that are computed once.

A unit is some rows of one input file (inputs/units.py). An encoder actor reads it, encodes it, asks the shard
actors, and writes its part of the output (job.py) in one atomic step; the driver holds names and numbers, never rows.

A unit is one batch for the encoder and for the shards whoever does it, with so many threads whatever the number of
actors, and files are numbered in the order of their names: so input order, the number of actors and restarts change
nothing in the answers, to the bit on one kind of hardware.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from raexmc_ray.cluster import living_nodes
from raexmc_ray.embed import map_units
from raexmc_ray.files import Folder
from raexmc_ray.inputs import InputFile, Written, find_inputs
from raexmc_ray.inputs.rows import Columns, Rejected, UnitRows
from raexmc_ray.inputs.units import UNIT_BYTES, UNIT_ROWS, Unit, UnitReader, UnreadableError, cut_files
from raexmc_ray.memory.index import use_threads
from raexmc_ray.memory.pool import SHARD_CPUS, ShardPool, ShardUnavailableError
from raexmc_ray.memory.snapshot import LABELS, Manifest, Snapshot, open_snapshot
from raexmc_ray.predict import aggregate, vote_evidence
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import ClusterSection, Precision, PredictionSection
from raexmc_ray.score.job import (
    JOB,
    PREDICTED,
    REJECTED,
    SUMMARY,
    WRITTEN,
    Job,
    JobInput,
    Summary,
    check_output,
    missing_units,
    part_name,
    summarise,
)
from raexmc_ray.score.predictions import no_predictions, predictions_table, rejected_table

BLOCKS = 4096
"""Pieces of work that Ray Data is given at most: a unit each, or several in a row where there are more units."""
LEAST_CPUS = 0.01
"""What a shard actor reserves at least."""
SHARD_PATIENCE_S = 1800.0
"""For a shard to be copied from an object store, and to answer where many encoders wait for it."""
UNITS_AT_A_TIME = 2
"""In an actor: while one of them waits for the shards, or is written, the other is encoded."""


def score(
    memory: Folder,
    inputs: Sequence[str],
    output: Folder,
    settings: PredictionSection,
    cluster: ClusterSection,
    columns: Columns = Columns(),  # noqa: B008  # it is frozen
    *,
    evidence: int = 0,
    snapshot: str | None = None,
    precision: Precision = "auto",
) -> Summary:
    """Write the best k labels of every input row under `output`, as job.py lays it out.

    inputs: what `find_inputs` takes. Parts have the schema PREDICTIONS, with `evidence` keys a label in one more column
    where that is not 0; snapshot, settings and input stand in the schema's metadata. snapshot: of the memory, in place
    of the current one. precision: of the encoder, as `use_hardware` takes it. Run again, it computes the units that are
    missing.
    Raises ValueError before the work begins where an input cannot be read or has not these columns, and where `output`
    is another job's; it may lie among the inputs. A row that cannot be scored stops nothing: it is written to rejected/
    with its reason.
    """
    started = time.monotonic()
    opened = open_snapshot(memory, snapshot)
    files = find_inputs(inputs, Written(output, WRITTEN))
    job = Job(
        snapshot=opened.manifest.id,
        settings=settings,
        evidence=evidence,
        id_column=columns.id,
        text_columns=columns.texts,
        unit_rows=UNIT_ROWS,
        unit_bytes=UNIT_BYTES,
        precision=precision,
        device="gpu" if cluster.gpu else f"cpu, threads: {_threads(cluster)}",
        inputs=[JobInput(file=str(file), size=file.size, modified_ns=file.modified_ns) for file in files],
    )
    is_new = check_output(output, job)
    cut = cut_files(files, columns)
    total = sum(part.rows for part in cut)
    if not total:
        raise ValueError(f"{', '.join(map(str, files[:3]))}: there is no row in it: nothing to score")
    if is_new and check_output(output, job):  # a job that was refused leaves nothing behind; cutting may take long
        (output / JOB).write(job.model_dump_json(indent=1, by_alias=True).encode() + b"\n")
    units = missing_units(output, cut)
    if not len(units) and (output / SUMMARY).size() is not None:
        return Summary.model_validate_json((output / SUMMARY).read())
    task = _Task(memory, output, files, columns, job, _threads(cluster), cluster.gpu)
    done = 0
    if len(units):
        (output / SUMMARY).remove_file()
        todo = int(np.sum(units["rows"]))
        with Progress("score", total, "rows", done=total - todo) as progress:
            for rows in _score_units(task, opened, units, cluster):
                done += rows
                progress.add(rows)
    return summarise(output, job, cut, done, time.monotonic() - started)


def _score_units(task: _Task, opened: Snapshot, units: pa.Table, cluster: ClusterSection) -> Iterator[int]:
    """Score these units; gives the rows that are done as they are done."""
    size = math.ceil(len(units) / BLOCKS)
    blocks = [units.slice(start, size) for start in range(0, len(units), size)]
    # One copy a node, which its actors share.
    labels = ray.put(pq.read_table(opened.file(LABELS), columns=["uid", "text"]).combine_chunks())
    nodes, cpus = _places_of_shards(opened.manifest, cluster)
    with ShardPool(task.memory, opened, cpus=cpus, timeout_s=SHARD_PATIENCE_S, nodes=nodes) as pool:
        yield from map_units(blocks, _UnitScorer, (task, pool, labels), cluster, UNITS_AT_A_TIME)


def _places_of_shards(manifest: Manifest, cluster: ClusterSection) -> tuple[list[str], float]:
    """(nodes that get all shards, CPUs that each shard actor reserves).

    The nodes are those on which an encoder can run, and all shards fit beside it; where there is none, the shards are
    spread over the cluster. The CPUs are as ever, or fewer where that would leave none to an encoder, which would be
    waited for for ever; a shard searches with one thread in any case.
    """
    shards = manifest.shards
    needed = shards * manifest.shard_memory
    alive = {node["NodeID"]: node["Resources"] for node in living_nodes()}
    spare = {node: there.get("CPU", 0) - cluster.cpus_per_worker for node, there in alive.items()}
    nodes = [
        node
        for node, there in alive.items()
        if spare[node] >= shards * LEAST_CPUS
        and there.get("memory", 0) >= needed
        and there.get("GPU", 0) >= cluster.gpu
    ]
    total = sum(there.get("CPU", 0) for there in alive.values())
    left = min(spare[node] for node in nodes) if nodes else total - cluster.cpus_per_worker
    return nodes, min(SHARD_CPUS, max(LEAST_CPUS, left / shards))


def _threads(cluster: ClusterSection) -> int:
    return max(1, int(cluster.cpus_per_worker))


@dataclass(frozen=True)
class _Task:
    """What every encoder actor of a job is told."""

    memory: Folder
    output: Folder
    files: list[InputFile]
    columns: Columns
    job: Job
    threads: int
    gpu: bool


class _UnitScorer:
    """An actor that reads units, encodes them, asks the shard actors, and writes what comes of it."""

    def __init__(self, task: _Task, pool: ShardPool, labels: Any) -> None:
        from raexmc_ray.encoder import use_hardware  # the driver does without torch

        use_threads(task.threads)
        encoder = open_snapshot(task.memory, task.job.snapshot).encoder()
        self._encoder = use_hardware(encoder, task.threads, task.job.precision, gpu=task.gpu)
        self._encoding = threading.Lock()
        self._task, self._pool, self._labels = task, pool, ray.get(labels)
        self._of_thread = threading.local()

    def __call__(self, units: pa.Table) -> dict[str, np.ndarray]:
        try:
            rows = [self._do(Unit(**unit)) for unit in units.to_pylist()]
        except (UnreadableError, ShardUnavailableError) as error:
            return {"error": np.array([str(error)])}
        except OSError as error:  # no space, no rights, a store that does not answer
            return {"error": np.array([f"{self._task.output}: cannot be written, or its inputs read: {error}"])}
        return {"rows": np.array([sum(rows)])}

    def _do(self, unit: Unit) -> int:
        output, name = self._task.output, part_name(unit.file, unit.number)
        if (output / PREDICTED / name).size() is not None:  # by an actor that died before it could say so
            return unit.rows
        file, job = self._task.files[unit.file], self._task.job
        metadata = {
            "snapshot": job.snapshot,
            "settings": job.model_dump_json(by_alias=True, exclude={"inputs"}),
            "input": job.inputs[unit.file].model_dump_json(),
            "first_row": str(unit.first + 1),
        }
        predicted, rejected = self._predict(unit, metadata)
        if rejected:  # before its predictions: a unit is done once they are there
            _write(output / REJECTED / name, rejected_table(str(file), rejected, metadata))
        else:  # of an actor that died between its two writes, and whose encoder failed
            (output / REJECTED / name).remove_file()
        _write(output / PREDICTED / name, predicted)
        return unit.rows

    def _predict(self, unit: Unit, metadata: dict[str, str]) -> tuple[pa.Table, list[Rejected]]:
        """The unit's predictions, and those of its rows that have none."""
        rows, settings, evidence = self._reader.read(unit), self._task.job.settings, self._task.job.evidence
        if rows.texts:
            with self._encoding:
                queries_BD = self._encoder.encode(rows.texts)
            rows, queries_BD = _drop_broken(rows, queries_BD)
        if not rows.texts:
            return no_predictions(evidence > 0, metadata), rows.rejected
        hits = self._pool.search(queries_BD, settings.neighbours)
        lambda_, temperature = settings.lambda_, settings.temperature
        found, votes = aggregate(hits, lambda_=lambda_, temperature=temperature, k=settings.k), None
        if evidence:
            voted = vote_evidence(hits, found, lambda_=lambda_, temperature=temperature, keys=evidence)
            votes = voted, self._pool.key_rows(voted.key_ids)
        return predictions_table(rows.ids, found, self._labels, votes, metadata), rows.rejected

    @property
    def _reader(self) -> UnitReader:
        """This thread's own, with its own place in a file."""
        if not hasattr(self._of_thread, "reader"):
            self._of_thread.reader = UnitReader(self._task.files, self._task.columns)
        return self._of_thread.reader


def _drop_broken(rows: UnitRows, queries_BD: np.ndarray) -> tuple[UnitRows, np.ndarray]:
    """Without the rows whose embedding is not finite, which are rejected."""
    finite = np.isfinite(queries_BD).all(1)
    if finite.all():
        return rows, queries_BD
    reason = "the encoder's embedding of the text is not finite"
    broken = [Rejected(rows.numbers[i], rows.ids[i], reason) for i in np.flatnonzero(~finite)]
    kept = np.flatnonzero(finite).tolist()
    numbers, ids, texts = [rows.numbers[i] for i in kept], [rows.ids[i] for i in kept], [rows.texts[i] for i in kept]
    return UnitRows(numbers, ids, texts, sorted([*rows.rejected, *broken])), queries_BD[finite]


def _write(file: Folder, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    file.write(sink.getvalue())
