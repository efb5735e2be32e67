"""Processes of the application are killed under load: answers are right, or errors that say what happened."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Rounds, free_port
from in_process import ingress_of
from load import Answers, Load, processes

import raexmc_ray
from raexmc_ray.client import ApiError, Client
from raexmc_ray.recipe import Recipe
from raexmc_ray.serve.errors import MissingShardsError
from raexmc_ray.serve.ingress import BATCHES
from raexmc_ray.serve.run import serving
from raexmc_ray.serve.schema import Joint, PredictReply, PredictRequest, ServeSettings

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(3600)]
TEXTS, SHARD_TIMEOUT_S = 10, 4.0


@pytest.fixture(scope="module")
def url(tiny_run: Recipe) -> Iterator[str]:
    settings = ServeSettings(
        memory=f"{tiny_run.cluster.storage}/memory",
        shard_replicas=2,
        encoder_cpus=0.5,
        shard_timeout_s=SHARD_TIMEOUT_S,
    )
    with serving(settings, port=free_port()) as url:
        yield url


@pytest.fixture(scope="module")
def expected(tiny_run: Recipe, tiny_texts: list[str]) -> Answers:
    memory = raexmc_ray.open(f"{tiny_run.cluster.storage}/memory")
    return {memory.manifest.id: memory.predict(tiny_texts[:TEXTS], evidence=1)}


def wait_until_whole(deployment: str, number: int, killed: int) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        try:
            running = processes(deployment)
        except Exception:  # the controller is away
            running = []
        if len(running) == number and killed not in running:
            return
        time.sleep(0.2)
    pytest.fail(f"{deployment} did not come back")


def kill_under_load(url: str, texts: list[str], expected: Answers, deployment: str, rounds: Rounds) -> Load:
    rng = random.Random(deployment)
    with Load(url, texts, expected) as load:
        for _ in rounds:
            load.wait_for(10)
            running = processes(deployment)
            time.sleep(rng.random() / 2)
            victim = rng.choice(running)
            os.kill(victim, signal.SIGKILL)
            wait_until_whole(deployment, len(running), victim)
            load.wait_for(10)
    assert load.wrong == []
    return load


def test_nobody_notices_that_a_shard_replica_is_lost(url: str, tiny_texts: list[str], expected: Answers) -> None:
    with Rounds("serving_shard", short=2, soak=10) as rounds:
        load = kill_under_load(url, tiny_texts[:TEXTS], expected, "MemoryShard-1", rounds)
        assert load.errors == load.broken == []


def test_a_lost_encoder_is_an_error_that_says_so(url: str, tiny_texts: list[str], expected: Answers) -> None:
    with Rounds("serving_encoder", soak=10) as rounds:
        load = kill_under_load(url, tiny_texts[:TEXTS], expected, "Encoder", rounds)
        assert load.broken == []


def test_the_controller_is_not_missed(url: str, tiny_texts: list[str], expected: Answers) -> None:
    with Rounds("serving_controller", soak=10) as rounds:
        load = kill_under_load(url, tiny_texts[:TEXTS], expected, "controller", rounds)
        assert load.errors == load.broken == []


def test_after_a_lost_ingress_answers_are_right_again(url: str, tiny_texts: list[str], expected: Answers) -> None:
    with Rounds("serving_ingress", soak=10) as rounds:
        load = kill_under_load(url, tiny_texts[:TEXTS], expected, "Ingress", rounds)
        assert load.broken == []


def test_nobody_fails_while_a_shard_replica_hangs(url: str, tiny_texts: list[str], expected: Answers) -> None:
    """It is stopped, and so neither answers nor raises anything: the other one is asked."""
    with Load(url, tiny_texts[:TEXTS], expected) as load:
        load.wait_for(10)
        stopped = processes("MemoryShard-1")[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            time.sleep(2 * SHARD_TIMEOUT_S)  # what waited for it alone would be over
            load.wait_for(10)
        finally:
            os.kill(stopped, signal.SIGCONT)
        load.wait_for(10)
    assert load.wrong == load.errors == load.broken == []


def test_a_missing_shard_is_named_or_left_out_where_that_is_allowed(
    url: str, tiny_run: Recipe, tiny_texts: list[str]
) -> None:
    """All replicas of a shard are stopped: they neither answer nor die, so that nobody restarts them."""
    shards = raexmc_ray.open(f"{tiny_run.cluster.storage}/memory").manifest.shards
    with Client(url) as client:
        whole = client.predict(tiny_texts[:1], evidence=100)
        stopped = processes("MemoryShard-2")
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(ApiError, match=r"503 .*no answer from shard 2: .*allow_partial") as caught:
                client.predict(tiny_texts[:1])
            assert time.monotonic() - started < 2 * SHARD_TIMEOUT_S
            assert caught.value.problem.missing_shards == [2]
            assert caught.value.retry_after_s
            partial = client.predict(tiny_texts[:1], evidence=100, allow_partial=True)
            assert partial.missing_shards == [2]
            votes = [vote for label in partial.answers[0].labels for vote in label.evidence or []]
            assert votes
            assert all(vote.key_id % shards != 2 for vote in votes)
        finally:
            for process in stopped:
                os.kill(process, signal.SIGCONT)
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            try:
                if client.predict(tiny_texts[:1], evidence=100).answers == whole.answers:
                    return
            except ApiError:
                time.sleep(0.2)
        pytest.fail("the shard did not come back")


async def asked_at_once(
    memory: Path, hanging: tuple[int, str], requests: list[PredictRequest]
) -> list[PredictReply | BaseException]:
    """What the ingress answers to requests that ride in one batch, while a shard never ends calls of this method."""

    async def hang() -> None:
        await asyncio.sleep(3600)

    settings = ServeSettings(memory=str(memory), timeout_s=3.0, shard_timeout_s=0.5)
    ingress = await ingress_of(settings, {hanging: hang})
    # The first ones are batches of their own, and keep the others waiting for each other.
    first = [PredictRequest(texts=["first"], allow_partial=True)] * BATCHES
    calls = [ingress.predict(request, "id", time.perf_counter(), {}) for request in [*first, *requests]]
    return (await asyncio.gather(*calls, return_exceptions=True))[BATCHES:]


def test_a_missing_shard_costs_a_mixed_batch_its_time_once(small_memory: Path) -> None:
    """Searches with other neighbours are other searches: the shard's time-outs must not add up to the deadline."""
    requests = [
        PredictRequest(texts=["vim"], neighbours=Joint(joint=10 + number), allow_partial=bool(number % 2))
        for number in range(8)
    ]
    replies = asyncio.run(asked_at_once(small_memory, (2, "search"), requests))
    for request, reply in zip(requests, replies, strict=True):
        if request.allow_partial:
            assert isinstance(reply, PredictReply)
            assert reply.missing_shards == [2]
        else:
            assert isinstance(reply, MissingShardsError)
            assert reply.shards == [2]


def test_a_shard_lost_after_the_search_is_missed_by_those_who_ask_for_evidence(small_memory: Path) -> None:
    requests = [PredictRequest(texts=["vim: an editor"], evidence=evidence) for evidence in (0, 100, 0, 50)]
    replies = asyncio.run(asked_at_once(small_memory, (1, "keys"), requests))
    for request, reply in zip(requests, replies, strict=True):
        if request.evidence:
            assert isinstance(reply, MissingShardsError)
            assert reply.shards == [1]
        else:
            assert isinstance(reply, PredictReply)
            assert reply.answers[0].labels
