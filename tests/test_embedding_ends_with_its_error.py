"""An embedding job that cannot be done ends with what is wrong, and is not tried for ever."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from helpers import MODEL, tiny_encoder, write_tiny_corpus

from raexmc_ray.cluster import refuse_unplaceable
from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import Embeddings, _UnitEncoder, stage, stage_encoder
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import build
from raexmc_ray.recipe import Recipe

pytestmark = pytest.mark.ray


def test_a_text_whose_embedding_is_not_finite_is_named(ray_cluster: str, tmp_path: Path) -> None:
    encoder = TextEncoder.load(MODEL, layers=1, max_tokens=16)
    with torch.no_grad():
        encoder.words[encoder.tokenize(["2"]).ids[1]] = torch.nan  # the word "2"
    encoder.save(tmp_path / "encoder")
    corpus = write_tiny_corpus(tmp_path / "corpus")
    recipe = Recipe.parse({"corpus": {"path": str(corpus)}, "cluster": {"storage": str(tmp_path / "run")}})
    with pytest.raises(ValueError, match=r"^instance 2 \(key 2, 'text number 2'\): .*not finite, nor are 1 others"):
        build(recipe, read_corpus(corpus), Folder.at(tmp_path / "encoder"))
    assert not list(tmp_path.rglob("unit-*"))


def test_a_text_that_cannot_be_encoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_encoder().save(tmp_path / "encoder")
    encode = TextEncoder.encode

    def refuse(self: TextEncoder, texts: list[str], *rest: int) -> np.ndarray:
        if "a bad text" in texts or len(texts) > 2:
            raise RuntimeError("no such token")
        return encode(self, texts, *rest)

    monkeypatch.setattr(TextEncoder, "encode", refuse)
    folder = Folder.at(tmp_path)
    unit = pa.table({"key_id": [0, 1], "kind": ["label"] * 2, "uid": ["p7", "p8"], "text": ["a text", "a bad text"]})
    embeddings = Embeddings(folder / "embeddings", 2, 1, "float32")
    worker = _UnitEncoder(folder / "encoder", embeddings, 64, torch.get_num_threads(), gpu=False)
    (said,) = worker(unit)["error"]
    assert said == "label p8 (key 1, 'a bad text'): this text cannot be encoded (RuntimeError: no such token)"
    with pytest.raises(RuntimeError, match="no such token"):  # of all together, which is no row's fault
        worker(pa.concat_tables([unit.slice(0, 1)] * 3))
    assert not list(tmp_path.rglob("unit-*"))


def test_an_encoder_that_a_node_does_not_see_is_told_with_the_remedy(tmp_path: Path) -> None:
    unit = pa.table({"key_id": [0], "text": ["a text"]})
    embeddings = Embeddings(Folder.at(tmp_path / "embeddings"), 1, 1, "float32")
    (said,) = _UnitEncoder(Folder.at(tmp_path / "encoder"), embeddings, 64, 1, gpu=False)(unit)["error"]
    remedy = "set cluster.storage, or --output, to a folder that is"
    assert said == f"{tmp_path}/encoder: is not seen by every node: {remedy}"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tiny_encoder().save(tmp_path / "encoder")
    unit = pa.table({"key_id": [0], "text": ["a text"]})
    folder = tmp_path / "embeddings"
    arguments = Folder.at(tmp_path / "encoder"), Embeddings(Folder.at(folder), 1, 1, "float32"), 64, 1
    worker = _UnitEncoder(*arguments, gpu=False)
    shutil.rmtree(folder)
    folder.write_bytes(b"")  # no folder can be made there
    (said,) = worker(unit)["error"]
    assert said.startswith(f"{folder}: cannot be written: ")
    (said,) = _UnitEncoder(*arguments, gpu=False)(unit)["error"]
    assert str(folder) in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"cpus_per_worker": 8},
            r"a shard wants 8 CPU and .* nearest has 4 CPU and .*: lower cluster\.cpus_per",
        ),
        ({"gpu": True}, r"an encoder actor wants 1 CPU and 1 GPU .* 0 GPU: .*set cluster\.gpu=false"),
    ],
)
def test_what_no_node_has_room_for_is_refused_at_once(
    ray_cluster: str, tmp_path: Path, change: dict, says: str
) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    recipe = Recipe.parse({"corpus": {"path": str(corpus)}, "cluster": {"storage": str(tmp_path / "run"), **change}})
    encoder = stage(Folder.at(tmp_path), tiny_encoder())
    with pytest.raises(ValueError, match=says):
        build(recipe, read_corpus(corpus), encoder)
    assert not list(tmp_path.rglob("unit-*"))


@pytest.mark.parametrize(
    ("estimate", "index", "says"),
    [
        ("build_bytes", "ivf-fp16", r"what writes a shard wants .*raise memory\.shards \(4\)"),
        ("training_bytes", "ivf-fp16", r"what trains the index wants .*memory\.lists \(\d+\)"),
        ("training_bytes", "flat-sq8", r"what trains the index wants .*cpus_per_worker, or add such a node"),
    ],
)
def test_what_no_node_has_the_memory_to_build_is_refused_before_anything_is_embedded(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimate: str, index: str, says: str
) -> None:
    monkeypatch.setattr(f"raexmc_ray.memory.build.{estimate}", lambda *_, **__: 1 << 50)
    corpus = write_tiny_corpus(tmp_path / "corpus")
    sections = {"memory": {"index": index}, "cluster": {"storage": str(tmp_path / "run")}}
    recipe = Recipe.parse({"corpus": {"path": str(corpus)}, **sections})
    with pytest.raises(ValueError, match=says) as refused:
        build(recipe, read_corpus(corpus), stage(Folder.at(tmp_path), tiny_encoder()))
    assert "1 CPU and 1048576.0 GiB of memory on one node" in str(refused.value)
    assert not list(tmp_path.rglob("unit-*"))


def test_a_node_that_a_growing_cluster_may_add_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was started by `ray up` or KubeRay says of each node which kind it is: it may add one of another kind."""
    head = {"Alive": True, "Resources": {"CPU": 4.0}, "Labels": {"ray.io/node-group": "head"}}
    gone = {"Alive": False, "Resources": {"CPU": 64.0}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [head, gone])
    refuse_unplaceable("it", {"CPU": 8}, "lower it")
    assert "it wants 8 CPU on one node, and the node that comes nearest has 4 CPU: lower it, unless" in caplog.text
    head["Labels"] = {}
    with pytest.raises(ValueError, match="lower it, or add such a node"):
        refuse_unplaceable("it", {"CPU": 8}, "lower it")
    refuse_unplaceable("it", {"CPU": 4}, "lower it")


@pytest.mark.parametrize(
    ("nodes", "wanted", "nearest"),
    [
        ([{"CPU": 64}, {"CPU": 2, "GPU": 1}], {"CPU": 4, "GPU": 1}, "2 CPU and 1 GPU"),
        ([{"CPU": 64}, {"CPU": 3}], {"CPU": 4, "GPU": 1}, "64 CPU and 0 GPU"),
        (
            [{"CPU": 64, "memory": 2**30}, {"CPU": 3, "memory": 2**36}],
            {"CPU": 4, "memory": 2**33},
            "3 CPU and 64.0 GiB",
        ),
    ],
)
def test_what_is_said_of_the_room_is_one_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict], wanted: dict, nearest: str
) -> None:
    monkeypatch.setattr("raexmc_ray.cluster.living_nodes", lambda: [{"Resources": n, "Labels": {}} for n in nodes])
    with pytest.raises(ValueError, match=f"and the node that comes nearest has {nearest}"):
        refuse_unplaceable("it", wanted, "lower it")


@pytest.mark.faults
def test_an_actor_that_dies_each_time_ends_the_job(ray_cluster: str, tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    settings = {
        "corpus": {"path": str(corpus)},
        "encoder": {"layers": 1},
        "cluster": {"storage": str(tmp_path / "run")},
    }
    recipe = Recipe.parse(settings)
    encoder, ended, killed = stage_encoder(Folder.at(tmp_path / "run"), MODEL, recipe.encoder), threading.Event(), set()

    def kill_each() -> None:
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "_UnitEncoder" in " ".join(process.cmdline()):
                        process.kill()
                        killed.add(process.pid)

    killer = threading.Thread(target=kill_each)
    killer.start()
    try:
        with pytest.raises(ray.exceptions.RayError):
            build(recipe, read_corpus(corpus), encoder)
    finally:
        ended.set()
        killer.join()
    assert len(killed) > 1, "it was tried again, but not for ever"
