"""Ray Data: the texts of any files to embeddings, in units that are computed once.

A unit is some rows of one input file (inputs/units.py). An encoder actor reads it, encodes it and writes its part
(inputs/job.py) in one atomic step; the driver holds names and numbers, never rows. All parts are computed in one
precision, as keys are (embed.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from raexmc_ray.embed import keys_encoder, map_units, say_precision, stage
from raexmc_ray.files import Folder
from raexmc_ray.inputs.job import Job, Summary, Task, UnitWorker, find_files, run_job
from raexmc_ray.inputs.rows import Columns, Rejected, UnitRows, encode_rows
from raexmc_ray.recipe import ClusterSection, EncoderSection


class EmbedJob(Job):
    """An embedding for each row."""

    PARTS, VERB = "embeddings", "embed"
    encoder: str
    """Fingerprint."""
    dimension: int
    dtype: Literal["float16", "float32"]

    @classmethod
    def written(cls) -> tuple[str, ...]:
        return *super().written(), f"encoders/given-{'[0-9a-f]' * 16}/*"


def embed_files(
    inputs: Sequence[str],
    output: Folder,
    encoder: str,
    section: EncoderSection,
    cluster: ClusterSection,
    columns: Columns = Columns(),  # noqa: B008  # it is frozen
    *,
    dtype: Literal["float16", "float32"] = "float32",
) -> Summary:
    """Write the embedding of every input row under `output`, as inputs/job.py lays it out: parts have the columns
    (id: string, embedding: `dtype` [d]). Run again, it computes the parts that are missing.

    inputs: what `find_inputs` takes. encoder: folder or URL, hub name or `package:NAME`, cut as the section says; to as
    many tokens as it was saved with where the section names none. Raises ValueError before the work begins where an
    input cannot be read or has not these columns, and where `output` is another job's; it may lie among the inputs. A
    row that cannot be embedded stops nothing: it is written to rejected/ with its reason.
    """
    from raexmc_ray.encoder import TextEncoder

    files = find_files(inputs, output, EmbedJob)
    tower = TextEncoder.load(encoder, layers=section.layers, max_tokens=section.max_tokens_given)
    settings = {"encoder": tower.fingerprint, "dimension": tower.dimension, "dtype": dtype}
    task = Task(output, files, EmbedJob.over(files, columns, **settings))

    def work(units: list[pa.Table]) -> Iterator[int]:
        say_precision(task.parts)
        arguments = (task, stage(output, tower), section.batch_size, max(1, int(cluster.cpus_per_worker)), cluster.gpu)
        yield from map_units(units, _FileEncoder, arguments, cluster)

    return run_job(task, work)


class _FileEncoder(UnitWorker):
    """An actor that embeds the rows of units."""

    VALUES_COME_AGAIN = False

    def __init__(self, task: Task, encoder: Folder, batch_size: int, threads: int, gpu: bool) -> None:
        self._settings, self._batch_size = (encoder, task.parts, threads, gpu), batch_size
        super().__init__(task)

    def open(self) -> None:
        self._encoder = keys_encoder(*self._settings)

    def part_of(self, rows: UnitRows) -> tuple[pa.Table, list[Rejected]]:
        job = self.task.job
        assert isinstance(job, EmbedJob)
        vectors_ND = np.empty((0, job.dimension), np.float32)
        if rows.texts:
            rows, vectors_ND = encode_rows(rows, lambda texts: self._encoder.encode(texts, self._batch_size))
        flat = pa.array(vectors_ND.astype(job.dtype, copy=False).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, job.dimension)
        return pa.table({"id": pa.array(rows.ids, pa.string()), "embedding": vectors}), rows.rejected
