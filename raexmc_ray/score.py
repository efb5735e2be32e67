"""Ray Data: label whole data sets offline, in units that are computed once.

Input rows are cut into units of one file each; a unit's predictions are written to a Parquet file of its own in
one atomic step, so a run that was stopped computes only what is missing, and input order, the number of actors
and restarts change nothing in the answers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from raexmc_ray.embed import map_units
from raexmc_ray.encoder import use_hardware
from raexmc_ray.files import Folder
from raexmc_ray.inputs import digest_texts, read_texts
from raexmc_ray.memory.pool import ShardPool
from raexmc_ray.memory.snapshot import LABELS, open_snapshot
from raexmc_ray.predict import aggregate
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import ClusterSection, PredictionSection

UNIT_ROWS = 1024
"""Input rows in a unit: one output file."""


def score(
    memory: Folder,
    inputs: list[str],
    output: Folder,
    settings: PredictionSection,
    cluster: ClusterSection,
    *,
    id_column: str = "id",
    text_column: str = "text",
) -> int:
    """Write the best k labels of every input row under `output`; returns the number of rows.

    inputs: Parquet, JSON-lines or text files (a text a line; its id is the line number). Each output file is
    Parquet: id, labels list<int64>, label_uids list<string>, scores list<float32>; settings and snapshot id
    stand in the schema's metadata. Raises ValueError that names the file and row of a text that is no text.
    """
    opened = open_snapshot(memory)
    metadata = {"snapshot": opened.manifest.id, "settings": settings.model_dump_json(by_alias=True)}
    tables = [read_texts(Path(path), id_column, text_column) for path in inputs]
    identity = json.dumps([metadata, [digest_texts(table) for table in tables]])
    parts = output / hashlib.sha256(identity.encode()).hexdigest()[:16]
    done = set(parts.names())
    blocks, total, finished = [], sum(len(table) for table in tables), 0
    for number, table in enumerate(tables):
        for start in range(0, len(table), UNIT_ROWS):
            name = f"part-{number:05d}-{start // UNIT_ROWS:06d}.parquet"
            unit = table.slice(start, UNIT_ROWS).combine_chunks()
            if name in done:
                finished += len(unit)
            else:
                blocks.append(unit.append_column("unit", pa.array([name] * len(unit))))
    with ShardPool(memory, opened) as pool, Progress("score", total, "rows", done=finished) as progress:
        if blocks:
            arguments = (memory, opened.manifest.id, pool, parts, settings, metadata, cluster)
            for rows in map_units(blocks, _UnitScorer, arguments, cluster):
                progress.add(rows)
    return total


class _UnitScorer:
    """An actor that encodes a unit, searches the shard actors, and writes the predictions."""

    def __init__(
        self,
        memory: Folder,
        snapshot: str,
        pool: ShardPool,
        output: Folder,
        settings: PredictionSection,
        metadata: dict[str, str],
        cluster: ClusterSection,
    ) -> None:
        opened = open_snapshot(memory, snapshot)
        self._encoder = use_hardware(opened.encoder(), int(cluster.cpus_per_worker))
        self._label_uids = pq.read_table(opened.file(LABELS))["uid"].combine_chunks()
        self._pool, self._output, self._settings, self._metadata = pool, output, settings, metadata

    def __call__(self, unit: pa.Table) -> dict[str, np.ndarray]:
        settings = self._settings
        queries_BD = self._encoder.encode(unit["text"].to_pylist())
        hits = self._pool.search(queries_BD, settings.neighbours)
        found = aggregate(hits, lambda_=settings.lambda_, temperature=settings.temperature, k=settings.k)
        kept = found.labels_Bk >= 0
        offsets = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        labels, scores = pa.array(found.labels_Bk[kept]), pa.array(found.scores_Bk[kept])
        columns = {"labels": labels, "label_uids": self._label_uids.take(labels), "scores": scores}
        table = pa.table(
            {"id": unit["id"]} | {n: pa.ListArray.from_arrays(offsets, values) for n, values in columns.items()}
        ).replace_schema_metadata(self._metadata)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        (self._output / unit["unit"][0].as_py()).write(sink.getvalue())
        return {"rows": np.array([len(unit)])}
