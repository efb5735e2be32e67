"""A killed shard is back at once: its process answers without torch, SciPy and pandas, a second to import.

Likewise Serve's replicas but for the encoder, the tasks that build shards, and the driver of scoring: without torch and
transformers, several seconds each.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import publish_keys, random_relevance, unit_rows

from raexmc_ray.memory.index import _copy, _copy_by_torch
from raexmc_ray.recipe import MemorySection

ANSWER = """
import sys
import numpy as np
import raexmc_ray.memory.pool
from raexmc_ray.files import Folder
from raexmc_ray.memory.shard import Shard
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.recipe import Neighbours

snapshot = open_snapshot(Folder.at(sys.argv[1]))
quantizer = snapshot.quantizer()
query = np.eye(1, 32, dtype=np.float32)
hits = Shard(snapshot, 0).search(query, Neighbours(joint=5), quantizer and quantizer.assign(query))
assert (hits.key_ids_Bb >= 0).all()
sys.exit(bool({"torch", "scipy", "pandas"} & set(sys.modules)))
"""


@pytest.mark.parametrize("kind", ["flat", "ivf-fp16", "ivf-pq", "hnsw"])
def test_the_first_answer_needs_none_of_them(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    publish_keys(
        tmp_path, unit_rows(rng, 300, 32), random_relevance(rng, 200, 100), 2, settings=MemorySection(index=kind)
    )
    assert subprocess.run([sys.executable, "-c", ANSWER, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("module", ["serve.app", "memory.build", "score.run"])
def test_only_who_encodes_needs_torch(module: str) -> None:
    said = f"import sys, raexmc_ray.{module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", said]).returncode == 0


def test_both_ways_to_widen_keys_give_the_same_bits() -> None:
    keys_BwD = np.random.default_rng(0).normal(size=(3, 40, 96)).astype(np.float16)
    by_numpy, by_torch = np.empty_like(keys_BwD, np.float32), np.empty_like(keys_BwD, np.float32)
    _copy(by_numpy, keys_BwD)
    _copy_by_torch(by_torch, keys_BwD)
    np.testing.assert_array_equal(by_numpy, by_torch)
