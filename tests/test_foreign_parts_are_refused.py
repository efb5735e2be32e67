"""A snapshot is one piece: parts of another one do not pass, even where sizes and checksums are in order."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import MODEL, change_manifest, publish_keys, random_relevance, tiny_encoder, unit_rows, write_tiny_corpus

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder, describe_file
from raexmc_ray.memory.shard import LocalShards
from raexmc_ray.memory.snapshot import SnapshotError, open_snapshot
from raexmc_ray.recipe import MemorySection


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    corpus = read_corpus(write_tiny_corpus(folder / "corpus"))
    raexmc_ray.build(corpus, tiny_encoder(), folder / "memory", MemorySection(shards=2))
    return folder / "memory"


@pytest.fixture
def memory(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "memory")


def snapshot(memory: Path) -> Path:
    return memory / "snapshots" / (memory / "CURRENT").read_text().strip()


def test_another_encoder_is_refused_though_the_checksums_are_its_own(memory: Path) -> None:
    other = TextEncoder.load(MODEL, layers=1, max_tokens=17)
    shutil.rmtree(snapshot(memory) / "encoder")
    other.save(snapshot(memory) / "encoder")

    def list_it(manifest: dict) -> None:
        for path in (snapshot(memory) / "encoder").iterdir():
            manifest["files"][f"encoder/{path.name}"] = describe_file(path).model_dump()

    change_manifest(snapshot(memory), list_it)
    with pytest.raises(SnapshotError, match=r"/encoder: this encoder .* is not the one that made the keys"):
        raexmc_ray.open(memory).predict(["a text"])


def test_the_shard_of_another_place_is_refused(memory: Path) -> None:
    segment = snapshot(memory) / "segments/0000"
    for name in ("index.faiss", "keys.arrow"):
        shutil.copyfile(segment / "shard-0000" / name, segment / "shard-0001" / name)
    with pytest.raises(SnapshotError, match=r"shard-0001/index\.faiss"):
        raexmc_ray.open(memory)


def test_every_file_is_listed_and_every_listed_file_is_needed(memory: Path) -> None:
    folder = snapshot(memory)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {*listed, "manifest.json"}
    for name in listed:
        away = folder / name
        away.rename(memory / "away")
        with pytest.raises(SnapshotError, match=rf"{name}: is missing"):
            raexmc_ray.open(memory).predict(["a text"])
        (memory / "away").rename(away)
    assert raexmc_ray.open(memory).predict(["a text"])


def test_a_file_that_is_not_listed_is_not_read(memory: Path) -> None:
    change_manifest(snapshot(memory), lambda manifest: manifest["files"].pop("labels.parquet"))
    with pytest.raises(SnapshotError, match=r"labels\.parquet: the manifest does not list"):
        raexmc_ray.open(memory).predict(["a text"])


def test_a_manifest_cut_anywhere_is_refused(memory: Path) -> None:
    path = snapshot(memory) / "manifest.json"
    whole = path.read_bytes().rstrip()
    for size in [*range(40), *range(40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(SnapshotError, match=r"manifest\.json: is torn"):
            open_snapshot(memory)


@pytest.mark.parametrize("change", [{"shards": "two"}, {"unknown": 1}, {"files": None}, {"format_version": "1"}])
def test_a_manifest_of_another_shape_is_refused(memory: Path, change: dict) -> None:
    change_manifest(snapshot(memory), lambda manifest: manifest.update(change))
    with pytest.raises(SnapshotError, match=r"manifest\.json"):
        open_snapshot(memory)


def test_more_segments_than_this_version_reads_are_refused(memory: Path) -> None:
    change_manifest(snapshot(memory), lambda manifest: manifest["segments"].append("0001"))
    with pytest.raises(SnapshotError, match="has 2 segments"):
        raexmc_ray.open(memory)


def test_a_snapshot_that_is_not_there_is_said(memory: Path) -> None:
    with pytest.raises(SnapshotError, match=r"manifest\.json: is missing"):
        raexmc_ray.open(memory, "none")
    with pytest.raises(FileNotFoundError, match="no memory at"):
        raexmc_ray.open(memory / "elsewhere")


def test_an_older_snapshot_stays_and_can_be_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys, relevance = unit_rows(rng, 6, 4), random_relevance(rng, 4, 2)
    for name in ("old", "new"):
        publish_keys(tmp_path, keys, relevance, 2, name)
    assert open_snapshot(tmp_path).manifest.id == "new"
    assert LocalShards(open_snapshot(tmp_path, "old"))


def test_no_query_no_answer(memory: Path) -> None:
    assert raexmc_ray.open(memory).predict([]) == []
    assert raexmc_ray.open(memory).predict([], evidence=2) == []


def test_a_written_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    file = Folder.at(tmp_path) / "CURRENT"
    file.write(b"one\n")
    file.write(b"two\n")
    assert file.read() == b"two\n"
    assert file.filesystem.get_file_info(file.path).size == 4
    with pytest.raises(TypeError):
        file.write("not bytes")  # type: ignore[arg-type]
    assert (Folder.at(tmp_path).names(), file.read()) == (["CURRENT"], b"two\n"), "nothing is left beside it"


def test_a_folder_that_is_filled_again_has_whole_files_and_writes_into_none(tmp_path: Path) -> None:
    """Two commands that stage one encoder: what the first has put there, actors have open."""
    folder, file = Folder.at(tmp_path / "encoder"), tmp_path / "encoder/inner/weights"

    def fill(content: bytes) -> None:
        with folder.filling() as local:
            (local / "inner").mkdir(exist_ok=True)
            (local / "inner/weights").write_bytes(content)
            assert file.exists() is (content != b"first")
            assert content == b"first" or file.read_bytes() == b"first", "the old one while it is written"
            if content == b"broken off":
                raise KeyboardInterrupt

    fill(b"first")
    with file.open("rb") as reader:
        with pytest.raises(KeyboardInterrupt):
            fill(b"broken off")
        assert file.read_bytes() == b"first"
        fill(b"second")
        assert (reader.read(), file.read_bytes()) == (b"first", b"second")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "encoder", tmp_path / "encoder/inner", file]


def test_a_folder_that_another_makes_while_it_is_listed_is_empty_or_there(tmp_path: Path) -> None:
    """Actors that begin at the same time look what is there, and make the folder where there is none."""
    folder, ended = tmp_path / "made and gone", threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            folder.mkdir()
            folder.rmdir()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert all(Folder.at(folder).names() == [] for _ in range(5_000))
    finally:
        ended.set()
        other.join()
