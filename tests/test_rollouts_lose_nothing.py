"""Roll-outs under load: no failed request, and every answer is exactly that of the one snapshot that it names."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import Rounds, free_port
from helpers import MODEL
from load import Answers, Load, processes

import raexmc_ray
from raexmc_ray.client import Client
from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import stage_encoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import build
from raexmc_ray.memory.defaults import with_defaults
from raexmc_ray.memory.snapshot import SnapshotError, open_snapshot
from raexmc_ray.recipe import PredictionSection, Recipe
from raexmc_ray.serve.environment import ENVIRONMENT
from raexmc_ray.serve.rest import APPLICATION, config_of, connect, set_user_config, wait_until_running
from raexmc_ray.serve.rollout import _hold, rollback, rollout
from raexmc_ray.serve.run import serving
from raexmc_ray.serve.schema import ServeSettings
from raexmc_ray.train.trainer import trained_encoder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
TEXTS, COMMAND = 10, Path(sys.executable).parent / "raexmc"


@pytest.fixture(scope="module")
def built(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A memory and two snapshots of it, of the trained encoder and of one that is not; the first is current."""
    storage = tmp_path_factory.mktemp("two")
    shutil.copytree(f"{tiny_run.cluster.storage}/memory", storage / "memory")
    cluster = tiny_run.cluster.model_copy(update={"storage": str(storage)})
    recipe = tiny_run.model_copy(update={"cluster": cluster})
    corpus = read_corpus(recipe.corpus.path)
    other = build(recipe, corpus, stage_encoder(Folder.at(storage), MODEL, recipe.encoder))
    first = build(recipe, corpus, trained_encoder(tiny_run, corpus))
    return storage / "memory", first, other


@pytest.fixture(scope="module")
def memory(built: tuple[Path, str, str]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def names(built: tuple[Path, str, str]) -> tuple[str, str]:
    """The snapshots: the current one, and the other."""
    return built[1:]


@pytest.fixture(scope="module")
def expected(memory: Path, names: tuple[str, str], tiny_texts: list[str]) -> Answers:
    return {name: raexmc_ray.open(memory, name).predict(tiny_texts[:TEXTS], evidence=1) for name in names}


@pytest.fixture(scope="module")
def application(memory: Path) -> Iterator[str]:
    with serving(ServeSettings(memory=str(memory)), port=free_port()) as url:
        yield url


@pytest.fixture
def url(application: str, memory: Path, names: tuple[str, str]) -> str:
    """The URL of the application, which answers from the first snapshot and was never rolled out."""
    (memory / "CURRENT").write_text(names[0] + "\n")
    client = connect()
    config = config_of(client, APPLICATION)
    config.pop("deployments", None)  # what roll-outs added
    config["args"] = {**config["args"], "snapshot": None}
    client.deploy_applications({"applications": [config]})
    wait_until_running(client, APPLICATION)
    return application


def test_back_and_forth_under_load(url: str, names: tuple[str, str], tiny_texts: list[str], expected: Answers) -> None:
    assert [label.uid for label in expected[names[0]][0]] != [label.uid for label in expected[names[1]][0]]
    with Rounds("rollouts", short=3, soak=50) as rounds:
        with Load(url, tiny_texts[:TEXTS], expected) as load:
            for number in rounds:
                before, after = names[number % 2], names[1 - number % 2]
                load.wait_for(20)
                assert rollout(after) == (before, after)
                load.snapshots.clear()
                load.wait_for(20)
                assert after in load.snapshots
        assert load.wrong == []
        assert load.errors == load.broken == []


def test_rollback_goes_to_the_one_before_and_makes_it_current(
    url: str, memory: Path, names: tuple[str, str], tiny_run: Recipe
) -> None:
    # As on a node of a cluster that serves.
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with Client(url) as client:
        with pytest.raises(ValueError, match="has not been rolled out"):
            rollback()
        subprocess.run([COMMAND, "rollout", names[1]], env=environment, check=True, timeout=120)
        assert rollout(names[1]) == (names[1], names[1]), "who stays goes back to where they came from"
        assert client.memory().snapshot == names[1]
        (memory / "CURRENT").write_text(names[1] + "\n")
        assert rollback() == names[::-1]
        assert client.memory().snapshot == names[0]
        assert (memory / "CURRENT").read_text().strip() == names[0]
        assert rollback() == (names[0], names[0]), "called again it stays"
        assert rollout() == (names[0], names[0]), "the current one, where none is named"
        corpus = read_corpus(tiny_run.corpus.path)
        other = PredictionSection(lambda_=0.2, k=3)
        tuned = with_defaults(Folder.at(memory), open_snapshot(memory), corpus.fingerprint, other)
        assert rollout() == (names[0], tuned), "other defaults are a snapshot as any other"
        assert PredictionSection.model_validate(client.memory().defaults) == other
        assert rollback() == (tuned, names[0])


def test_a_rollback_that_is_broken_off_is_gone_on_with(
    url: str, memory: Path, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rollout(names[1]) == names
    (memory / "CURRENT").write_text(names[1] + "\n")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken_off:
        broken_off.setattr("raexmc_ray.serve.rollout.wait_until_running", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rollback()
    assert (memory / "CURRENT").read_text().strip() == names[0]
    assert rollback() == (names[0], names[0])
    with Client(url) as client:
        assert client.memory().snapshot == names[0]


def test_a_rollout_waits_for_what_another_left_under_way(url: str, names: tuple[str, str]) -> None:
    """Serve reaches no replica while it moves it."""
    client, deployments = connect(), ["Ingress", "Encoder", *(f"MemoryShard-{shard}" for shard in range(3))]
    for there, back in [names[::-1], names] * 5:
        set_user_config(client, APPLICATION, deployments, {"snapshot": there, "previous": back})
        assert rollout(back) == (there, back)
        assert rollout(there) == (back, there)


@pytest.mark.faults
def test_a_replica_that_is_lost_meanwhile_fails_no_rollout(
    url: str, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[int] = []

    def and_lose_an_encoder(*arguments: Any) -> None:
        set_user_config(*arguments)
        lost.extend(processes("Encoder"))
        os.kill(lost[0], signal.SIGKILL)

    monkeypatch.setattr("raexmc_ray.serve.rollout.set_user_config", and_lose_an_encoder)
    assert rollout(names[1]) == names
    with Client(url) as client:
        assert client.predict(["vim"]).snapshot == names[1]
    assert lost[0] not in processes("Encoder")


@pytest.mark.faults
def test_a_replica_that_is_lost_while_it_opens_the_snapshot_fails_no_rollout(
    url: str, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[int] = []

    def and_lose_an_encoder(*arguments: Any) -> None:
        lost.extend(processes("Encoder"))
        os.kill(lost[0], signal.SIGSTOP)  # so that it is still at it when it is killed
        threading.Timer(10, os.kill, (lost[0], signal.SIGKILL)).start()
        _hold(*arguments)

    monkeypatch.setattr("raexmc_ray.serve.rollout._hold", and_lose_an_encoder)
    assert rollout(names[1]) == names
    with Client(url) as client:
        assert client.predict(["vim"]).snapshot == names[1]
    assert lost[0] not in processes("Encoder")


def test_a_damaged_snapshot_changes_nothing(
    url: str, memory: Path, names: tuple[str, str], tiny_texts: list[str], expected: Answers
) -> None:
    damaged = next((memory / "snapshots" / names[1]).rglob("index.faiss"))
    content = damaged.read_bytes()
    with Load(url, tiny_texts[:TEXTS], expected) as load:
        load.wait_for(5)
        try:
            damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(SnapshotError, match=str(damaged)):
                rollout(names[1])
            with pytest.raises((SnapshotError, FileNotFoundError), match="no-such"):
                rollout("no-such")
        finally:
            damaged.write_bytes(content)
        load.wait_for(20)
    assert load.snapshots == {names[0]}
    assert load.wrong == load.errors == load.broken == []


def test_a_config_that_is_deployed_again_goes_back_to_where_it_began(
    url: str, memory: Path, names: tuple[str, str]
) -> None:
    """As README says: Serve builds an application once for the same `args`."""
    assert rollout(names[1]) == names
    (memory / "CURRENT").write_text(names[1] + "\n")
    client = connect()
    config = config_of(client, APPLICATION)
    del config["deployments"]  # which the roll-out added
    with Client(url) as asking:
        client.deploy_applications({"applications": [config], "target_capacity": 100})
        wait_until_running(client, APPLICATION)
        assert asking.memory().snapshot == names[0], "Serve has begun to build anew: README can do without"
        assert rollout() == names
        assert client.get_serve_details()["target_capacity"] == 100, "the cluster's own setting is left"
        assert asking.memory().snapshot == names[1]
        named = {**config, "args": {**config["args"], "snapshot": names[1]}}
        client.deploy_applications({"applications": [named]})
        wait_until_running(client, APPLICATION)
        assert asking.memory().snapshot == names[1]
