"""The batcher: every caller gets its own result, batches are bounded, a lone caller does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raexmc_ray.serve.batching import Batcher


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sets(st.integers(0, 39)),
)
def test_every_caller_gets_its_own(sizes: list[int], max_size: int, concurrency: int, failing: set[int]) -> None:
    batches: list[list[tuple[int, int]]] = []
    running = most = 0

    async def work(batch: Sequence[tuple[int, int]]) -> list[int | Exception]:
        nonlocal running, most
        batches.append(list(batch))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return [KeyError(place) if place in failing else 10 * place for place, _ in batch]

    async def run() -> list[int | BaseException]:
        batcher = Batcher[tuple[int, int], int](work, size=lambda i: i[1], max_size=max_size, concurrency=concurrency)
        return await asyncio.gather(*(batcher.submit(item) for item in enumerate(sizes)), return_exceptions=True)

    results = asyncio.run(run())
    for place, result in enumerate(results):
        assert isinstance(result, KeyError) if place in failing else result == 10 * place
    assert sorted(item for batch in batches for item in batch) == list(enumerate(sizes))
    assert all(len(batch) == 1 or sum(size for _, size in batch) <= max_size for batch in batches)
    assert most <= concurrency


def test_what_waits_goes_together_and_who_has_gone_costs_nothing() -> None:
    batches: list[list[int]] = []

    async def run() -> None:
        gate = asyncio.Event()

        async def work(batch: Sequence[int]) -> Sequence[int]:
            batches.append(list(batch))
            await gate.wait()
            return batch

        batcher = Batcher[int, int](work, size=lambda _: 1, max_size=100)
        calls = [asyncio.ensure_future(batcher.submit(i)) for i in range(6)]
        await asyncio.sleep(0)
        calls[3].cancel()
        await asyncio.sleep(0)
        gate.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert [result for result in done if isinstance(result, int)] == [0, 1, 2, 4, 5]

    asyncio.run(run())
    assert batches == [[0], [1, 2, 4, 5]]


def test_an_error_of_the_work_reaches_every_caller_and_the_next_batch_runs() -> None:
    async def work(batch: Sequence[int]) -> Sequence[int]:
        if 0 in batch:
            raise OSError("lost")
        return batch

    async def run() -> None:
        batcher = Batcher[int, int](work, size=lambda _: 1, max_size=2)
        with pytest.raises(OSError, match="lost"):
            await batcher.submit(0)
        assert await batcher.submit(1) == 1

    asyncio.run(run())
