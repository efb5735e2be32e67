"""Texts of any files become embeddings: each row once, and a stopped run computes what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import MODEL, tiny_encoder

from raexmc_ray import embed
from raexmc_ray.embed import Embeddings, _UnitEncoder, embed_files, embed_keys
from raexmc_ray.encoder import TextEncoder, use_hardware
from raexmc_ray.files import Folder
from raexmc_ray.recipe import ClusterSection, EncoderSection, Precision


@pytest.mark.ray
def test_files_become_embeddings(ray_cluster: str, tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(9000)]  # three units
    pq.write_table(pa.table({"id": [f"p{i}" for i in range(8000)], "text": texts[:8000]}), tmp_path / "a.parquet")
    rows = [{"id": f"j{i}", "text": texts[i]} for i in range(8000, 9000)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [str(tmp_path / name) for name in ("a.parquet", "b.jsonl")]

    def run() -> Embeddings:
        section = EncoderSection(layers=1, max_tokens=16)
        return embed_files(inputs, Folder.at(tmp_path / "out"), MODEL, section, ClusterSection(encoders=1))

    done = run()
    folder = Path(done.folder.path)
    ids = pq.read_table(folder / "ids.parquet")
    assert ids["key_id"].to_pylist() == list(range(9000))
    assert ids["id"].to_pylist() == [f"p{i}" for i in range(8000)] + [f"j{i}" for i in range(8000, 9000)]
    vectors = np.concatenate(list(done.of_shard(0)))
    # In bfloat16 where the CPU can, so rounding follows from the batch: the same units, the same numbers.
    encoder = use_hardware(TextEncoder.load(MODEL, layers=1, max_tokens=16), 1, keys=True)
    starts = range(0, len(texts), embed.UNIT_KEYS)
    expected = np.concatenate([encoder.encode(texts[start : start + embed.UNIT_KEYS]) for start in starts])
    assert np.allclose(vectors, expected, atol=1e-5)
    assert (vectors * tiny_encoder().encode(texts)).sum(1).min() > 0.9999, "near float32's, in these rows"
    assert np.array_equal(done.take(np.array([3, 900, 8999])), vectors[[3, 900, 8999]])

    units = {path: path.stat().st_mtime_ns for path in folder.glob("unit-*")}
    gone = sorted(units)[1]
    content = gone.read_bytes()
    gone.unlink()
    assert run() == done
    assert gone.read_bytes() == content
    assert all(path.stat().st_mtime_ns == before for path, before in units.items() if path != gone)


def test_an_output_among_the_inputs_hides_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and encoder are written between the two runs, which embed the same."""
    monkeypatch.setattr(embed, "embed_keys", lambda *_: None)
    (tmp_path / "embeddings").mkdir()
    for name in ("a.jsonl", "embeddings/b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"id": name, "text": "vim"}) + "\n")
    folder, section = Folder.at(tmp_path), EncoderSection(layers=1, max_tokens=16)
    done = [embed_files([str(tmp_path)], folder, MODEL, section, ClusterSection()) for _ in range(2)]
    assert done[0] == done[1]
    assert pq.read_table(f"{done[0].folder}/ids.parquet")["id"].to_pylist() == ["a.jsonl", "embeddings/b.jsonl"]


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
    assert embeddings.precision() == begun
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
            write(self.parent / f"computed-in-{precision}", data)

    monkeypatch.setattr(Folder, "write", write_both)
    worker = _UnitEncoder(Folder.at(tmp_path / "encoder"), embeddings, 64, torch.get_num_threads(), gpu=False)
    (said,) = worker(table)["error"]
    assert said.startswith(f"{tmp_path}/keys: was begun in bfloat16 and in float32 at once")
    with pytest.raises(ValueError, match="at once, by nodes of two kinds: remove it"):
        embed_keys(table, Folder.at(tmp_path / "encoder"), embeddings, EncoderSection(), ClusterSection())


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


def test_a_unit_with_other_keys_is_refused(tmp_path: Path) -> None:
    embeddings = Embeddings(Folder.at(tmp_path), 5000, 2, "float32")
    for unit in embeddings.missing():
        embeddings.write(unit, np.ones((embeddings.size(unit), 4), np.float32))
    (tmp_path / "unit-000001.arrow").write_bytes((tmp_path / "unit-000000.arrow").read_bytes())
    with pytest.raises(ValueError, match=r"unit-000001\.arrow: has other keys.*remove it"):
        list(embeddings.of_shard(0))
