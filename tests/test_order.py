"""The order of what a search finds is the same everywhere: score descending, id ascending, to the last tie."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from raexmc_ray.memory.order import best_columns


@given(
    st.integers(0, 3),
    st.integers(0, 12),
    st.integers(0, 14),
    st.sampled_from([[-np.inf, -1.0, -0.0, 0.0, 1e-45, 0.5], list(np.linspace(-1, 1, 1000))]),
    st.integers(0, 1 << 30),
)
def test_best_columns_are_those_of_a_whole_sort(B: int, W: int, b: int, values: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice(np.array(values, np.float32), (B, W))
    ids = np.array([rng.permutation(100)[:W] for _ in range(B)], np.int64).reshape(B, W) << 33
    columns = best_columns(scores, ids, b)
    assert columns.shape == (B, min(b, W))
    for row in range(B):
        wanted = sorted(range(W), key=lambda i: (-scores[row, i], ids[row, i]))[:b]
        there = [i for i in wanted if scores[row, i] > -np.inf]
        assert columns[row, : len(there)].tolist() == there
        assert sorted(columns[row].tolist()) == sorted(set(columns[row].tolist()))
        assert (scores[row, columns[row, len(there) :]] == -np.inf).all()
