"""Ray Data: label whole data sets offline, in units that are computed once.

A unit is some rows of one input file (inputs/units.py). An encoder actor reads it, encodes it, asks the shard
actors, and writes its part of the output (inputs/job.py) in one atomic step; the driver holds names and numbers, never
rows.

A unit is one batch for the encoder and for the shards whoever does it, with so many threads whatever the number of
actors, and files are numbered in the order of their names: so input order, the number of actors and restarts change
nothing in the answers, to the bit on one kind of hardware.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from raexmc_ray.cluster import living_nodes
from raexmc_ray.embed import map_units
from raexmc_ray.files import Folder
from raexmc_ray.inputs.job import Job, Summary, Task, UnitWorker, find_files, run_job
from raexmc_ray.inputs.rows import Columns, Rejected, UnitRows, encode_rows
from raexmc_ray.memory.index import use_threads
from raexmc_ray.memory.pool import SHARD_CPUS, ShardPool, ShardUnavailableError
from raexmc_ray.memory.shard import cut_texts
from raexmc_ray.memory.snapshot import LABELS, Manifest, Snapshot, SnapshotError, open_snapshot
from raexmc_ray.predict import aggregate, vote_evidence
from raexmc_ray.recipe import ClusterSection, Precision, PredictionSection
from raexmc_ray.score.predictions import no_predictions, predictions_table

TEXT_CHARACTERS = 1000
"""Of the text of a label, or of a key that voted, as in a reply over HTTP: those of all labels and votes of a unit are
in memory together."""
LEAST_CPUS = 0.01
"""What a shard actor reserves at least."""
SHARD_PATIENCE_S = 1800.0
"""For a shard to be copied from an object store, and to answer where many encoders wait for it."""
UNITS_AT_A_TIME = 2
"""In an actor: while one of them waits for the shards, or is written, the other is encoded."""


class ScoreJob(Job):
    """Labels for each row."""

    PARTS, VERB = "predictions", "score"
    snapshot: str
    settings: PredictionSection
    evidence: int
    """Keys named for each label."""
    precision: Precision
    device: str
    """What encodes: a GPU, or a CPU with so many threads: another may round otherwise."""

    def how_to_go_on(self, before: Self) -> str:
        return f" (--snapshot {before.snapshot} goes on with that job)" if before.snapshot != self.snapshot else ""


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
    """Write the best k labels of every input row under `output`, as inputs/job.py lays it out.

    inputs: what `find_inputs` takes. Parts have the schema PREDICTIONS, with `evidence` keys a label in one more column
    where that is not 0; snapshot, settings and input stand in the schema's metadata. snapshot: of the memory, in place
    of the current one. precision: of the encoder, as `use_hardware` takes it. Run again, it computes the units that are
    missing.
    Raises ValueError before the work begins where an input cannot be read or has not these columns, and where `output`
    is another job's; it may lie among the inputs. A row that cannot be scored stops nothing: it is written to rejected/
    with its reason.
    """
    opened = open_snapshot(memory, snapshot)
    files = find_files(inputs, output, ScoreJob)
    job = ScoreJob.over(
        files,
        columns,
        snapshot=opened.manifest.id,
        settings=settings,
        evidence=evidence,
        precision=precision,
        device="gpu" if cluster.gpu else f"cpu, threads: {_threads(cluster)}",
    )
    task = Task(output, files, job)
    return run_job(task, lambda units: _score_units(task, memory, opened, units, cluster))


def _score_units(
    task: Task, memory: Folder, opened: Snapshot, units: list[pa.Table], cluster: ClusterSection
) -> Iterator[int]:
    """Score these units; gives the rows that are done as they are done."""
    # One copy a node, which its actors share.
    shown = cut_texts(pq.read_table(opened.file(LABELS), columns=["uid", "text"]), TEXT_CHARACTERS)
    labels = ray.put(shown.combine_chunks())
    nodes, cpus = _places_of_shards(opened.manifest, cluster)
    with ShardPool(memory, opened, cpus=cpus, timeout_s=SHARD_PATIENCE_S, nodes=nodes) as pool:
        arguments = (task, memory, pool, labels, _threads(cluster), cluster.gpu)
        yield from map_units(units, _UnitScorer, arguments, cluster, UNITS_AT_A_TIME)


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


class _UnitScorer(UnitWorker):
    """An actor that encodes the texts of units, and asks the shard actors."""

    # A SnapshotError is of a shard that was lost, and opened again what somebody has damaged or removed meanwhile.
    ENDS_THE_JOB = (*UnitWorker.ENDS_THE_JOB, ShardUnavailableError, SnapshotError)

    def __init__(self, task: Task, memory: Folder, pool: ShardPool, labels: Any, threads: int, gpu: bool) -> None:
        assert isinstance(task.job, ScoreJob)
        self._job, self._memory, self._threads, self._gpu = task.job, memory, threads, gpu
        self._encoding = threading.Lock()
        self._pool, self._labels = pool, ray.get(labels)
        super().__init__(task)

    def open(self) -> None:
        from raexmc_ray.encoder import use_hardware  # the driver does without torch

        use_threads(self._threads)
        encoder = open_snapshot(self._memory, self._job.snapshot).encoder()
        self._encoder = use_hardware(encoder, self._threads, self._job.precision, gpu=self._gpu)

    def part_of(self, rows: UnitRows) -> tuple[pa.Table, list[Rejected]]:
        table, rejected = self._predict(rows)
        return table.replace_schema_metadata({"snapshot": self._job.snapshot}), rejected

    def _predict(self, rows: UnitRows) -> tuple[pa.Table, list[Rejected]]:
        settings, evidence = self._job.settings, self._job.evidence
        if rows.texts:
            with self._encoding:
                rows, queries_BD = encode_rows(rows, self._encoder.encode)
        if not rows.texts:
            return no_predictions(evidence > 0), rows.rejected
        hits = self._pool.search(queries_BD, settings.neighbours)
        lambda_, temperature = settings.lambda_, settings.temperature
        found, votes = aggregate(hits, lambda_=lambda_, temperature=temperature, k=settings.k), None
        if evidence:
            voted = vote_evidence(hits, found, lambda_=lambda_, temperature=temperature, keys=evidence)
            votes = voted, cut_texts(self._pool.key_rows(voted.key_ids), TEXT_CHARACTERS)
        return predictions_table(rows.ids, found, self._labels, votes), rows.rejected
