"""Texts of any files become embeddings: each row once, and a stopped run computes what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import MODEL, tiny_encoder

from raexmc_ray import embed
from raexmc_ray.embed import Embeddings, embed_files
from raexmc_ray.encoder import TextEncoder, use_hardware
from raexmc_ray.files import Folder
from raexmc_ray.recipe import ClusterSection, EncoderSection


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
    threads = torch.get_num_threads()
    encoder = use_hardware(TextEncoder.load(MODEL, layers=1, max_tokens=16), 1, keys=True)
    starts = range(0, len(texts), embed.UNIT_KEYS)
    expected = np.concatenate([encoder.encode(texts[start : start + embed.UNIT_KEYS]) for start in starts])
    torch.set_num_threads(threads)
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
