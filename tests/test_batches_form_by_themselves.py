"""The batcher: every caller gets its own result, batches are bounded, a lone caller does not wait."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raexmc_ray.serve.batching import Batcher
from raexmc_ray.serve.ingress import batches_at_a_time
from raexmc_ray.serve.schema import ServeSettings

Answer = Callable[[int, int | Exception], None]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sets(st.integers(0, 39)),
)
def test_every_caller_gets_its_own(sizes: list[int], max_size: int, concurrency: int, failing: set[int]) -> None:
    batches: list[list[tuple[int, int]]] = []
    running = most = 0

    async def work(batch: Sequence[tuple[int, int]], answer: Answer) -> None:
        nonlocal running, most
        batches.append(list(batch))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        for i, (place, _) in enumerate(batch):
            answer(i, KeyError(place) if place in failing else 10 * place)

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

        async def work(batch: Sequence[int], answer: Answer) -> None:
            batches.append(list(batch))
            await gate.wait()
            for place, item in enumerate(batch):
                answer(place, item)

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
    async def work(batch: Sequence[int], answer: Answer) -> None:
        if 0 in batch:
            raise OSError("lost")
        answer(0, batch[0])

    async def run() -> None:
        batcher = Batcher[int, int](work, size=lambda _: 1, max_size=2)
        with pytest.raises(OSError, match="lost"):
            await batcher.submit(0)
        assert await batcher.submit(1) == 1

    asyncio.run(run())


def test_who_is_answered_does_not_wait_for_the_rest_of_the_batch() -> None:
    async def run() -> None:
        gate = asyncio.Event()

        async def work(batch: Sequence[int], answer: Answer) -> None:
            answer(len(batch) - 1, batch[-1])
            await gate.wait()
            raise OSError("lost")

        batcher = Batcher[int, int](work, size=lambda _: 1, max_size=3)
        calls = [asyncio.ensure_future(batcher.submit(i)) for i in range(3)]
        assert await calls[0] == 0  # a batch of its own, which goes on
        gate.set()
        assert await calls[2] == 2
        with pytest.raises(OSError, match="lost"):
            await calls[1]

    asyncio.run(run())


def test_a_batch_belongs_to_none_of_its_callers() -> None:
    """Serve keeps a request's id in a context variable, and stops what was begun in it when its caller leaves."""
    caller: contextvars.ContextVar[int | None] = contextvars.ContextVar("caller", default=None)
    found: list[int | None] = []

    async def work(batch: Sequence[int], answer: Answer) -> None:
        found.append(caller.get())
        await asyncio.sleep(0)
        for place, item in enumerate(batch):
            answer(place, item)

    async def run() -> None:
        batcher = Batcher[int, int](work, size=lambda _: 1, max_size=2)

        async def call(number: int) -> int:
            caller.set(number)
            return await batcher.submit(number)

        assert await asyncio.gather(*map(call, range(5))) == [0, 1, 2, 3, 4]

    asyncio.run(run())
    assert set(found) == {None}


def test_after_a_cancelled_batch_the_next_one_runs() -> None:
    async def work(batch: Sequence[int], answer: Answer) -> None:
        if 0 in batch:
            raise asyncio.CancelledError
        for place, item in enumerate(batch):
            answer(place, item)

    async def run() -> None:
        batcher = Batcher[int, int](work, size=lambda _: 1, max_size=2)
        calls = [batcher.submit(i) for i in range(3)]
        done = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert isinstance(done[0], asyncio.CancelledError)
        assert done[1:] == [1, 2]

    asyncio.run(run())


def test_there_are_batches_enough_to_keep_every_encoder_busy() -> None:
    def at_a_time(**settings: int) -> int:
        return batches_at_a_time(ServeSettings(memory="m", **settings))

    assert at_a_time() == at_a_time(ingress_replicas=4) == 2
    for ingresses in (1, 2, 3):
        assert ingresses * at_a_time(ingress_replicas=ingresses, encoder_replicas=4) >= 8
        assert ingresses * at_a_time(ingress_replicas=ingresses, encoder_replicas_at_most=8) >= 16
