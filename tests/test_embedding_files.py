"""Texts of any files become embeddings: each row once, and a stopped run computes what is missing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from helpers import MODEL, tiny_encoder

from raexmc_ray import embed
from raexmc_ray.embed import Embeddings, _UnitEncoder, embed_keys, precision_of
from raexmc_ray.embed_files import EmbedJob, _FileEncoder, embed_files
from raexmc_ray.encoder import TextEncoder, use_hardware
from raexmc_ray.files import Folder
from raexmc_ray.inputs.job import Summary, Task, find_files
from raexmc_ray.inputs.rows import Columns
from raexmc_ray.inputs.units import cut_files
from raexmc_ray.recipe import ClusterSection, EncoderSection, Precision

SECTION = EncoderSection(layers=1, max_tokens=16)


def run(
    inputs: list[Path], output: Path, encoders: int = 1, dtype: Literal["float16", "float32"] = "float32"
) -> Summary:
    places, cluster = [str(path) for path in inputs], ClusterSection(encoders=encoders)
    return embed_files(places, Folder.at(output), MODEL, SECTION, cluster, dtype=dtype)


@pytest.mark.ray
def test_files_become_embeddings(ray_cluster: str, tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(3000)]  # three units, and one
    pq.write_table(pa.table({"id": [f"p{i}" for i in range(2500)], "text": texts[:2500]}), tmp_path / "a.parquet")
    rows = [{"id": f"j{i}", "text": texts[i]} for i in range(2500, 3000)]
    rows[7:9] = [{"id": "empty", "text": ""}, {"text": "no id"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs, output = [tmp_path / "b.jsonl", tmp_path / "a.parquet"], tmp_path / "out"

    summary = run(inputs, output)
    assert (summary.rows, summary.results, summary.parts) == (3000, 2998, 4)
    assert summary.rejected == {"the id is missing": 1, "the text is empty": 1}
    found = pq.read_table(output / "embeddings")
    assert found["id"].to_pylist() == [f"p{i}" for i in range(2500)] + [
        f"j{i}" for i in range(2500, 3000) if i not in (2507, 2508)
    ]
    vectors = found["embedding"].combine_chunks().flatten().to_numpy().reshape(2998, -1)
    assert vectors.dtype == np.float32
    # In bfloat16 where the CPU can, so rounding follows from the batch: the same units, the same numbers.
    encoder = use_hardware(TextEncoder.load(MODEL, layers=1, max_tokens=16), 1, keys=True)
    del texts[2507:2509]
    starts = [0, 1024, 2048, 2500, 2998]
    expected = np.concatenate([encoder.encode(texts[start:stop]) for start, stop in itertools.pairwise(starts)])
    assert np.allclose(vectors, expected, atol=1e-5)
    assert (vectors * tiny_encoder().encode(texts)).sum(1).min() > 0.9999, "near float32's, in these rows"
    part = pq.read_schema(output / "embeddings/part-00001-000000.parquet").metadata
    assert json.loads(part[b"settings"])["encoder"] == encoder.fingerprint
    assert part[b"first_row"] == b"1"
    rejected = pq.read_table(output / "rejected").to_pylist()
    assert [(row["row"], row["id"], row["reason"]) for row in rejected] == [
        (8, "empty", "the text is empty"),
        (9, None, "the id is missing"),
    ]

    parts = {path: path.stat().st_mtime_ns for path in output.rglob("part-*")}
    gone = sorted(parts)[1]
    content = gone.read_bytes()
    gone.unlink()
    gone_on = run(inputs, output, encoders=2)
    assert gone_on.last_run.rows == 1024
    assert gone.read_bytes() == content
    assert all(path.stat().st_mtime_ns == before for path, before in parts.items() if path != gone)
    assert run(inputs, output) == gone_on, "nothing is left to do"


@pytest.mark.ray
def test_a_trained_encoder_cuts_texts_as_it_was_saved(ray_cluster: str, tmp_path: Path) -> None:
    TextEncoder.load(MODEL, layers=1, max_tokens=64).save(tmp_path / "trained")
    text = " ".join(map(str, range(60)))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": text}) + "\n")
    for section, tokens in ((EncoderSection(), 64), (EncoderSection(max_tokens=16), 16)):
        output = Folder.at(tmp_path / f"out-{tokens}")
        embed_files([str(tmp_path / "a.jsonl")], output, str(tmp_path / "trained"), section, ClusterSection(encoders=1))
        (found,) = pq.read_table(str(output / "embeddings"))["embedding"].to_pylist()
        expected = TextEncoder.load(MODEL, layers=1, max_tokens=tokens).encode([text])[0]
        assert np.dot(found, expected) > 0.9999


@pytest.mark.ray
def test_half_of_the_bytes_are_written_where_they_do(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("vim\nemacs\n")
    summary = run([tmp_path], tmp_path, dtype="float16")  # which lies among its inputs
    assert (summary.results, summary.files) == (2, 1)
    found = pq.read_table(tmp_path / "embeddings")
    vectors = found["embedding"].combine_chunks().flatten().to_numpy().reshape(2, -1)
    assert vectors.dtype == np.float16
    assert np.allclose(vectors, tiny_encoder().encode(["vim", "emacs"]), atol=0.02)
    assert run([tmp_path], tmp_path, dtype="float16") == summary, "what it wrote is none of its inputs"
    with pytest.raises(ValueError, match="another job: dtype was 'float16', and is 'float32': give another --output"):
        run([tmp_path], tmp_path)
    job = json.loads((tmp_path / "job.json").read_text())
    (tmp_path / "job.json").write_text(json.dumps({**job, "encoder": "of another model"}))
    with pytest.raises(ValueError, match="another job: encoder was 'of another model'"):
        run([tmp_path], tmp_path, dtype="float16")


def test_the_driver_holds_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred megabytes of texts cost it no more than two lines do, but for a few buffers."""
    monkeypatch.setattr("raexmc_ray.embed_files.map_units", lambda units, *_: iter(()))  # killed before the first unit
    peaks = []
    for rows in (2, 100_000):
        with (tmp_path / f"{rows}.jsonl").open("w") as file:
            file.writelines(json.dumps({"id": row, "text": f"{row} " * 180}) + "\n" for row in range(rows))
        tracemalloc.start()
        with pytest.raises(ValueError, match="parts were removed"):
            run([tmp_path / f"{rows}.jsonl"], tmp_path / f"out-{rows}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "100000.jsonl").stat().st_size > 100 << 20
    assert peaks[1] < peaks[0] + (32 << 20)


def test_an_output_among_the_inputs_hides_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raexmc_ray.embed_files.map_units", lambda units, *_: iter(()))  # killed before the first unit
    (tmp_path / "embeddings").mkdir()
    for name in ("a.jsonl", "embeddings/b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"id": name, "text": "vim"}) + "\n")
    with pytest.raises(ValueError, match=r"there is embeddings in it, but no job\.json: give another --output"):
        run([tmp_path], tmp_path)
    (tmp_path / "embeddings").rename(tmp_path / "more")
    for _ in range(2):
        with pytest.raises(ValueError, match="2 parts were removed"):
            run([tmp_path], tmp_path)


ON_GPUS = """
import numpy as np, pyarrow as pa, ray
from raexmc_ray.embed import map_units
from raexmc_ray.recipe import ClusterSection

class Worker:
    def __call__(self, block):
        return {"rows": np.array([len(block) * len(ray.get_gpu_ids())])}

ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
table = pa.table({"key_id": range(100)})
blocks = [table.slice(start, 40) for start in (0, 40, 80)]
print(sorted(map_units(blocks, Worker, (), ClusterSection(gpu=True, encoders=2))))
"""


@pytest.mark.ray
def test_each_actor_of_a_pool_owns_a_gpu_and_gets_whole_units() -> None:
    """Ray's own account of GPUs, which need not be there: another cluster, whose GPUs no other test sees."""
    done = subprocess.run([sys.executable, "-c", ON_GPUS], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["[20, 40, 40]"], done.stderr[-2000:]


@pytest.mark.parametrize("begun", ["bfloat16", "float32"])
def test_keys_are_of_one_precision_whatever_hardware_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: Precision
) -> None:
    monkeypatch.setattr(embed, "UNIT_KEYS", 2)
    tiny_encoder().save(tmp_path / "encoder")
    table = pa.table({"key_id": range(4), "text": [f"text number {i}" for i in range(4)]})
    embeddings, threads = Embeddings(Folder.at(tmp_path / "keys"), 4, 1, "float32"), torch.get_num_threads()
    for unit in range(2):  # each on another kind of CPU
        monkeypatch.setattr("raexmc_ray.encoder.bfloat16_is_native", lambda _, unit=unit: (begun == "bfloat16") != unit)
        worker = _UnitEncoder(Folder.at(tmp_path / "encoder"), embeddings, 64, threads, gpu=False)
        assert worker(table.slice(2 * unit, 2))["rows"].tolist() == [2]
    assert precision_of(embeddings.folder) == begun
    encoder = use_hardware(TextEncoder.load(str(tmp_path / "encoder")), threads, begun)
    expected = [encoder.encode(table["text"].to_pylist()[start : start + 2]) for start in (0, 2)]
    assert np.array_equal(np.concatenate(list(embeddings.of_shard(0))), np.concatenate(expected))


def test_keys_that_two_kinds_of_hardware_begin_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them saw no other when it looked first."""
    tiny_encoder().save(tmp_path / "encoder")
    table = pa.table({"key_id": [0], "text": ["a text"]})
    embeddings, write = Embeddings(Folder.at(tmp_path / "keys"), 1, 1, "float32"), Folder.write

    def write_both(self: Folder, data: bytes) -> None:
        for precision in ("bfloat16", "float32"):
            write(self.parent / f".computed-in-{precision}", data)

    monkeypatch.setattr(Folder, "write", write_both)
    worker = _UnitEncoder(Folder.at(tmp_path / "encoder"), embeddings, 64, torch.get_num_threads(), gpu=False)
    (said,) = worker(table)["error"]
    assert said.startswith(f"{tmp_path}/keys: was begun in bfloat16 and in float32 at once")
    with pytest.raises(ValueError, match="at once, by nodes of two kinds: remove it"):
        embed_keys(table, Folder.at(tmp_path / "encoder"), embeddings, EncoderSection(), ClusterSection())


def test_half_a_unit_of_a_killed_actor_is_removed(tmp_path: Path) -> None:
    embeddings = Embeddings(Folder.at(tmp_path / "keys"), 1, 1, "float32")
    embeddings.write(0, np.ones((1, 4), np.float32))
    (tmp_path / "keys/.unit-000000.arrow.abc").write_bytes(b"half of it")
    table = pa.table({"key_id": [0], "text": ["a text"]})
    embed_keys(table, Folder.at(tmp_path / "encoder"), embeddings, EncoderSection(), ClusterSection())
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["unit-000000.arrow"]


@pytest.mark.parametrize("begun", ["bfloat16", "float32"])
def test_files_are_embedded_in_one_precision_whatever_hardware_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: Precision
) -> None:
    """And two that began at once are told to remove what the job wrote: never its inputs, which may lie there, too."""
    (tmp_path / "a.txt").write_text("vim\nemacs\n")
    tiny_encoder().save(tmp_path / "encoder")
    files = find_files([str(tmp_path / "a.txt")], Folder.at(tmp_path), EmbedJob)
    job = EmbedJob.over(files, Columns(), encoder="", dimension=tiny_encoder().dimension, dtype="float32")
    task, threads, computed = Task(Folder.at(tmp_path), files, job), torch.get_num_threads(), []
    unit = cut_files(files, Columns())[0].table(0, np.arange(1))

    def worker() -> _FileEncoder:
        return _FileEncoder(task, Folder.at(tmp_path / "encoder"), 64, threads, gpu=False)

    for turn in range(2):  # each on another kind of CPU
        monkeypatch.setattr("raexmc_ray.encoder.bfloat16_is_native", lambda _, turn=turn: (begun == "bfloat16") != turn)
        assert worker()(unit)["rows"].tolist() == [2]
        (part,) = (tmp_path / "embeddings").glob("part-*")
        computed.append(part.read_bytes())
        part.unlink()
    assert computed[0] == computed[1]
    for precision in ("bfloat16", "float32"):
        (tmp_path / f"embeddings/.computed-in-{precision}").touch()
    (said,) = worker()(unit)["error"]
    assert said.startswith(f"{tmp_path}/embeddings: was begun in bfloat16 and in float32 at once")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_an_error_not_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"owns a GPU, and torch sees none: install the extra \[gpu\]"):
        use_hardware(tiny_encoder(), 1, gpu=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("keys", "shards"), [(5, 1), (4096, 3), (9000, 7), (3, 5)])
def test_every_key_is_in_one_shard_of_one_unit(tmp_path: Path, keys: int, shards: int, dtype: str) -> None:
    embeddings = Embeddings(Folder.at(tmp_path), keys, shards, dtype)
    vectors = np.random.default_rng(0).normal(size=(keys, 6)).astype(dtype)
    for unit in embeddings.missing():
        first = unit * embed.UNIT_KEYS
        embeddings.write(unit, vectors[first : first + embeddings.size(unit)])
    assert embeddings.missing() == []
    for shard in range(shards):
        assert np.array_equal(np.concatenate(list(embeddings.of_shard(shard))), vectors[shard::shards])
    some = np.sort(np.random.default_rng(1).choice(keys, size=min(keys, 50), replace=False))
    assert np.array_equal(embeddings.take(some), vectors[some])
    assert embeddings.take(some[:0]).shape == (0, 6)


class WaitingStore(fs.FSSpecHandler):
    """Files that are opened only while as many others are: who opens one after the other waits for ever."""

    def __init__(self, at_once: int) -> None:
        super().__init__(LocalFileSystem())
        self.opened: list[str] = []
        self._together = threading.Barrier(at_once)

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.opened.append(path)
        self._together.wait(timeout=10)
        return super().open_input_file(path)


def test_units_on_an_object_store_are_read_side_by_side_each_opened_once(tmp_path: Path) -> None:
    keys, units = 7 * embed.UNIT_KEYS + 5, 8
    local = Embeddings(Folder.at(tmp_path), keys, 3, "float32")
    vectors = np.random.default_rng(0).normal(size=(keys, 4)).astype(np.float32)
    for unit in local.missing():
        first = unit * embed.UNIT_KEYS
        local.write(unit, vectors[first : first + local.size(unit)])
    store = WaitingStore(units)
    remote = Embeddings(Folder(fs.PyFileSystem(store), str(tmp_path)), keys, 3, "float32")
    some = np.arange(0, keys, 5)
    assert np.array_equal(remote.take(some), vectors[some])
    assert len(store.opened) == len(set(store.opened)) == units
    assert np.array_equal(np.concatenate(list(remote.of_shard(1))), vectors[1::3])
    assert len(store.opened) == 2 * units


def test_a_unit_with_other_keys_is_refused(tmp_path: Path) -> None:
    embeddings = Embeddings(Folder.at(tmp_path), 5000, 2, "float32")
    for unit in embeddings.missing():
        embeddings.write(unit, np.ones((embeddings.size(unit), 4), np.float32))
    (tmp_path / "unit-000001.arrow").write_bytes((tmp_path / "unit-000000.arrow").read_bytes())
    with pytest.raises(ValueError, match=r"unit-000001\.arrow: has other keys.*remove it"):
        list(embeddings.of_shard(0))


def test_a_torn_unit_is_refused_by_name(tmp_path: Path) -> None:
    embeddings = Embeddings(Folder.at(tmp_path), 5000, 2, "float32")
    for unit in embeddings.missing():
        embeddings.write(unit, np.ones((embeddings.size(unit), 4), np.float32))
    torn = tmp_path / "unit-000001.arrow"
    torn.write_bytes(torn.read_bytes()[:-100])
    for read in (lambda: list(embeddings.of_shard(0)), lambda: embeddings.take(np.array([1, 4999]))):
        with pytest.raises(ValueError, match=r"unit-000001\.arrow: is torn.*remove it, and run the same command"):
            read()
