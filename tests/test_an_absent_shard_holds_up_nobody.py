"""While a shard does not answer, one call waits for it in full; others are answered without it, or refused, at once."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import pytest
from in_process import ingress_of

from raexmc_ray.serve.absent import ABSENT_S, Absent
from raexmc_ray.serve.errors import MissingShardsError
from raexmc_ray.serve.schema import PredictReply, PredictRequest, ServeSettings

PATIENCE_S = 2.0


@pytest.mark.ray
def test_one_call_finds_out_whether_a_shard_is_back(small_memory: Path) -> None:
    gone = True

    async def before() -> None:
        if gone:
            await asyncio.sleep(3600)

    async def run() -> None:
        nonlocal gone
        settings = ServeSettings(memory=str(small_memory), timeout_s=30.0, shard_timeout_s=PATIENCE_S)
        ingress = await ingress_of(settings, {(1, "search"): before})

        async def ask(partial: bool = True) -> tuple[PredictReply, float]:
            began = time.perf_counter()
            request = PredictRequest(texts=["vim"], allow_partial=partial)
            return await ingress.predict(request, "id", began, {}), time.perf_counter() - began

        reply, seconds = await ask()
        assert reply.missing_shards == [1]
        assert seconds > PATIENCE_S
        finds_out = asyncio.create_task(ask())
        await asyncio.sleep(0.05)  # it is on its way
        for _ in range(4):
            reply, seconds = await ask()
            assert reply.missing_shards == [1]
            assert seconds < PATIENCE_S / 2
            with pytest.raises(MissingShardsError, match="shard 1"):
                await ask(partial=False)
        reply, seconds = await finds_out
        assert reply.missing_shards == [1]
        assert seconds > PATIENCE_S
        gone = False
        for _ in range(3):
            reply, _ = await ask(partial=False)
            assert reply.missing_shards == []
        gone = True
        _, seconds = await ask()
        assert seconds > PATIENCE_S, "it was back, so it is waited for"

    asyncio.run(run())


def test_a_call_that_is_given_up_is_no_answer_and_lets_the_next_one_find_out() -> None:
    absent = Absent()
    with suppress(TimeoutError), absent.asking(3) as first:
        raise TimeoutError
    with suppress(asyncio.CancelledError), absent.asking(3) as finds_out:
        with suppress(TimeoutError), absent.asking(3) as meanwhile:
            raise TimeoutError
        with absent.asking(4) as other:
            pass
        raise asyncio.CancelledError
    with absent.asking(3) as next_one:
        pass
    with absent.asking(3) as answered, absent.asking(3) as too:
        pass
    assert (first, finds_out, meanwhile, other, next_one) == (None, None, ABSENT_S, None, None)
    assert (answered, too) == (None, None)
