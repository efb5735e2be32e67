"""While a shard does not answer, one call waits for it in full; others are answered without it, or refused, at once.
Nobody is held up, or fails, for what is wrong with others."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from in_process import ingress_of, method

from raexmc_ray.files import Folder
from raexmc_ray.memory.snapshot import SnapshotError, open_snapshot
from raexmc_ray.serve.absent import ABSENT_S, Absent
from raexmc_ray.serve.again import Call
from raexmc_ray.serve.deployments import Encoder
from raexmc_ray.serve.errors import MissingShardsError
from raexmc_ray.serve.held import Held
from raexmc_ray.serve.schema import Joint, PredictReply, PredictRequest, ServeSettings

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


@pytest.mark.ray
def test_a_shard_is_not_absent_because_a_request_had_no_time_left(small_memory: Path) -> None:
    """The encoder took it: the shards answer as they always do, later than the request's own deadline."""
    slow_s = 0.3

    async def before() -> None:
        await asyncio.sleep(slow_s)

    async def run() -> None:
        settings = ServeSettings(memory=str(small_memory), timeout_s=2.0, shard_timeout_s=1.5)
        ingress = await ingress_of(settings, {(shard, "search"): before for shard in range(3)})
        missing: list[int] = []
        ingress._metrics.missing = missing.append

        async def ask(joint: int) -> PredictReply:
            request = PredictRequest(texts=["vim"], neighbours=Joint(joint=joint))
            return await ingress.predict(request, "id", time.perf_counter(), {})

        await ask(10)  # which loads the encoder
        encode = ingress._encode.remote

        async def late(*arguments: object, **named: object) -> object:
            await asyncio.sleep(settings.timeout_s - slow_s / 2)
            return await encode(*arguments, **named)

        ingress._encode = method(late)
        with pytest.raises(TimeoutError):
            await ask(10)
        await asyncio.sleep(2 * slow_s)  # what is left of the batch has its turn
        ingress._encode.remote = encode
        replies = await asyncio.gather(ask(10), ask(20))  # each searched by itself
        assert [reply.missing_shards for reply in replies] == [[], []]
        assert missing == []

    asyncio.run(run())


@pytest.mark.ray
def test_a_snapshot_that_cannot_be_opened_leaves_the_ingress_where_it_is(small_memory: Path) -> None:
    async def run() -> None:
        ingress = await ingress_of(ServeSettings(memory=str(small_memory)))
        before = ingress.view
        with pytest.raises(SnapshotError, match="no-such"):
            await ingress.hold("no-such")
        assert ingress.view is before

    asyncio.run(run())


def test_no_call_fails_for_an_opening_that_nobody_waited_for() -> None:
    """It failed after its caller had given up: whoever comes next has it tried again."""
    tries: list[str] = []

    def open_(snapshot: str) -> str:
        tries.append(snapshot)
        time.sleep(0.2)
        if len(tries) == 1:
            raise OSError("the store was not there")
        return snapshot

    async def run() -> None:
        held = Held(open_)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(held.get("a"), 0.05)
        await asyncio.sleep(0.5)
        assert await held.get("a") == await held.get("a") == "a"
        assert tries == ["a", "a"]

    asyncio.run(run())


def test_no_call_fails_for_a_snapshot_of_another(small_memory: Path) -> None:
    """They wait for the encoder together."""

    async def run() -> None:
        encoder: Any = Encoder.func_or_class(Folder.at(small_memory), 1, False, "float32", 32)
        snapshot = open_snapshot(small_memory).manifest.id
        await encoder.hold(snapshot)
        names = ["no-such-0", snapshot, "no-such-1", snapshot, "no-such-2"]  # before and after it in any order
        calls = (encoder.encode(name, ["vim"], call=Call()) for name in [snapshot, *names])
        first, *answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(answer, SnapshotError) for answer in answers] == [True, False, True, False, True]
        assert (answers[1] == first).all()
        assert (answers[3] == first).all()

    asyncio.run(run())
