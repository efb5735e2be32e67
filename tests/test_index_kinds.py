"""Every kind of index behind the one search: sharding is invisible, and what is approximate finds nearly all."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers import publish_keys, random_relevance, tied_rows, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.embed import BLOCK_UNITS, UNIT_KEYS
from raexmc_ray.memory.hits import Hits
from raexmc_ray.memory.index import ShardIndex
from raexmc_ray.memory.kinds import SAMPLE_PER_LIST, IndexSpec, build_index, nearest_lists, train_index
from raexmc_ray.memory.plan import BLOCK_KEYS, SHARD_LIMIT, MemoryPlan, build_bytes, plan_memory, shard_bytes
from raexmc_ray.memory.shard import LocalShards, Shard
from raexmc_ray.recipe import INDEX_KINDS, MemorySection, Neighbours

MEASURED = Path(__file__).parent.parent / "benchmarks/results/memory_scale.json"
SAME_WHATEVER_THE_SHARDS = ("flat", "flat-fp16", "flat-sq8", "ivf-fp16")
ALL = [*INDEX_KINDS, "factory:IVF4,SQ8", "factory:IVF256,Flat", "factory:Flat"]


def clustered(rng: np.random.Generator, rows: int, d: int, clusters: int) -> np.ndarray:
    centres = rng.normal(size=(clusters, d))
    vectors = centres[rng.integers(clusters, size=rows)] + 0.5 * rng.normal(size=(rows, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def memory_of(keys: np.ndarray, instances: int, shards: int, section: MemorySection, folder: str | Path) -> LocalShards:
    relevance = random_relevance(np.random.default_rng(0), instances, len(keys) - instances)
    return LocalShards(publish_keys(Path(folder) / str(shards), keys, relevance, shards, settings=section))


def equal(left: Hits, right: Hits) -> bool:
    names = ("key_ids_Bb", "scores_Bb", "is_label_Bb", "votes", "vote_offsets")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(SAME_WHATEVER_THE_SHARDS),
    instances=st.integers(1, 150),
    labels=st.integers(1, 60),
    shards=st.integers(2, 9),
    b=st.integers(1, 120),
    ties=st.booleans(),
)
def test_sharding_is_invisible(
    seed: int, kind: str, instances: int, labels: int, shards: int, b: int, ties: bool
) -> None:
    """Duplicated keys, b beyond a shard, empty shards, labels without an instance and the other way round."""
    rng = np.random.default_rng(seed)
    keys = tied_rows(rng, instances + labels) if ties else unit_rows(rng, instances + labels, 16)
    keys[rng.integers(len(keys), size=len(keys) // 3)] = keys[0]
    queries = np.concatenate([keys[-3:], tied_rows(rng, 2) if ties else unit_rows(rng, 2, 16)])
    section = MemorySection(index=kind, **({"lists": min(7, len(keys)), "probes": 3} if kind == "ivf-fp16" else {}))
    with tempfile.TemporaryDirectory() as folder:
        one, many = (memory_of(keys, instances, n, section, folder) for n in (1, shards))
        for neighbours in (Neighbours(joint=b), Neighbours(instances=b, labels=2), Neighbours(labels=b)):
            hits = many.search(queries, neighbours)
            assert equal(hits, one.search(queries, neighbours))
            assert equal(many.search(queries[:1], neighbours), one.search(queries[:1], neighbours)), (
                "whatever the batch"
            )


@pytest.mark.parametrize("kind", ALL)
def test_nearly_all_are_found_whatever_the_kind(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    keys, instances = clustered(rng, 4000, 64, 60), 2500
    queries = clustered(np.random.default_rng(0), 40, 64, 60)
    section = MemorySection(index=kind, probes=40 if kind.startswith("ivf") else None)
    memory = memory_of(keys, instances, 3, section, tmp_path)
    exact = queries.astype(np.float64) @ keys.T.astype(np.float64)
    for neighbours, first, stop in (
        (Neighbours(joint=50), 0, 4000),
        (Neighbours(instances=50, labels=0), 0, instances),
        (Neighbours(instances=0, labels=50), instances, 4000),
    ):
        hits = memory.search(queries, neighbours)
        wanted = first + np.argsort(-exact[:, first:stop], axis=1)[:, :50]
        recall = np.mean([np.isin(got, want).mean() for got, want in zip(hits.key_ids_Bb, wanted, strict=True)])
        assert recall >= 0.95
        found = hits.key_ids_Bb >= 0
        assert ((hits.key_ids_Bb >= first) & (hits.key_ids_Bb < stop))[found].all(), "of the kind that was asked for"
        assert (np.diff(hits.scores_Bb, axis=1)[found[:, 1:]] <= 0).all()
        rows, _ = np.nonzero(found)
        errors = np.abs(hits.scores_Bb[found] - exact[rows, hits.key_ids_Bb[found]])
        assert errors.max() < (0.02 if "8" in kind else 1e-3)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_memory_may_be_smaller_than_its_shards(tmp_path: Path, kind: str, rows: int) -> None:
    if kind.startswith("factory:IVF"):
        pytest.skip("a factory string's lists are as many as it says: FAISS refuses fewer keys")
    keys = np.concatenate([np.eye(rows, 16, dtype=np.float32), np.eye(2, 16, 8, dtype=np.float32)])
    memory = memory_of(
        keys, rows, 9, MemorySection(index=kind, **({"probes": 9} if kind.startswith("ivf") else {})), tmp_path
    )
    hits = memory.search(keys[:1], Neighbours(joint=20))
    assert hits.key_ids_Bb.shape == (1, 20)
    assert hits.key_ids_Bb[0, 0] == 0
    found = hits.key_ids_Bb[0][hits.key_ids_Bb[0] >= 0]
    assert len(set(found)) == len(found)
    if kind != "ivf-pq":  # FAISS's fast scan leaves out keys whose codes are the worst in every part
        assert sorted(found) == list(range(rows + 2))


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_blocks_change_nothing_and_the_size_is_as_planned(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    keys = clustered(rng, 6000, 64, 40)
    spec = IndexSpec.of(MemorySection(index=kind), len(keys), 64)
    contents = []
    for name, parts in (("one", 1), ("many", 7)):
        (tmp_path / name).mkdir()
        blocks = np.array_split(keys, parts)
        build_index(tmp_path / name, train_index(spec, keys), spec, len(keys), lambda blocks=blocks: blocks)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())})
    if kind != "hnsw":  # its links depend on the order in which threads add
        assert contents[0] == contents[1]
    assert sum(map(len, contents[0].values())) == pytest.approx(shard_bytes(spec, len(keys)), rel=0.15)


FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
from raexmc_ray.memory.kinds import IndexSpec, build_index, train_index
from raexmc_ray.recipe import MemorySection

keys = np.eye(64, dtype=np.float32)[np.arange(20_000) % 64]
spec = IndexSpec.of(MemorySection(index=sys.argv[1]), len(keys), 64)
try:
    build_index(Path(sys.argv[2]), train_index(spec, keys), spec, len(keys), lambda: [keys])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "file"), [("flat", "index.faiss"), ("ivf-pq", "vectors.npy")])
def test_a_full_disk_ends_a_build_with_an_error_that_names_the_file(tmp_path: Path, kind: str, file: str) -> None:
    """On a disk of a megabyte, which is there for one process only. A page that is mapped, and has no room, kills."""
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    if not shutil.which("unshare") or subprocess.run([*alone, mount, tmp_path], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    command = [*alone, f'{mount} && exec "$@"', tmp_path, sys.executable, "-c", FULL_DISK, kind, tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"[Errno 28] No space left on device: '{tmp_path / file}'\n")


def test_an_index_whose_last_bytes_find_no_room_is_refused(tmp_path: Path) -> None:
    spec, keys = IndexSpec(kind="flat", dimension=64), unit_rows(np.random.default_rng(0), 100, 64)

    def build() -> None:
        build_index(tmp_path, train_index(spec, keys), spec, len(keys), lambda: [keys])

    build()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "index.faiss").stat().st_size - 1, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/index\.faiss'"):
            build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("string", ["IVF64,Flat", "PCA32,IVF64,Flat", "IVF64,SQ8,Refine(Flat)"])
def test_a_query_looks_into_as_many_lists_of_a_factory_string_as_are_asked_for(tmp_path: Path, string: str) -> None:
    keys = unit_rows(np.random.default_rng(0), 4000, 64)  # a list has little more of the nearest than another
    exact = np.argsort(-(keys[:40] @ keys.T), axis=1)[:, :50]
    recalls = []
    for probes in (1, 8, 64):
        section = MemorySection(index=f"factory:{string}", probes=probes)
        hits = memory_of(keys, 2500, 3, section, tmp_path / str(probes)).search(keys[:40], Neighbours(joint=50))
        recalls.append(np.mean([np.isin(got, want).mean() for got, want in zip(hits.key_ids_Bb, exact, strict=True)]))
    assert recalls[0] + 0.1 < recalls[1] < recalls[2]
    assert IndexSpec.of(MemorySection(index=f"factory:{string}"), 4000, 64).probes == 32
    assert IndexSpec.of(MemorySection(index="factory:IVF4096,Flat"), 225_000, 64).probes == 128
    assert IndexSpec.of(MemorySection(index="factory:IVF4096,Flat"), 225_000, 64).sample == SAMPLE_PER_LIST * 4096


@pytest.mark.parametrize(
    "string", ["PCA32,Flat", "OPQ8_32,IVF16,PQ8x4fs", "IVF16,SQ8,RFlat", "PCA32,IVF16,SQ8,RFlat", "HNSW16"]
)
def test_a_factory_string_finds_instances_and_labels_apart(tmp_path: Path, string: str) -> None:
    keys, instances = clustered(np.random.default_rng(0), 2000, 64, 40), 1200
    memory = memory_of(keys, instances, 2, MemorySection(index=f"factory:{string}"), tmp_path)
    everything = memory.search(keys[::50], Neighbours(joint=2000)).key_ids_Bb
    for first, stop, neighbours in (
        (0, instances, Neighbours(instances=30, labels=0)),
        (instances, 2000, Neighbours(instances=0, labels=30)),
    ):
        found = memory.search(keys[::50], neighbours).key_ids_Bb
        assert ((found >= first) & (found < stop)).all(), "of the kind that was asked for"
        best = [row[(row >= first) & (row < stop)][:30] for row in everything]
        assert np.mean([np.isin(got, want).mean() for got, want in zip(found, best, strict=True)]) > 0.8


@pytest.mark.parametrize("string", ["IVF16,SQ8", "IVF16,Flat", "IVF16,PQ8x4fs", "IVF16,PQ8x4"])
def test_lists_of_a_factory_string_are_found_once_for_all_shards(tmp_path: Path, string: str) -> None:
    keys = clustered(np.random.default_rng(0), 2000, 64, 40)
    section = MemorySection(index=f"factory:{string}", probes=3)
    relevance = random_relevance(np.random.default_rng(0), 1200, 800)
    snapshot = publish_keys(tmp_path, keys, relevance, 2, settings=section)
    quantizer, index = snapshot.quantizer(), Shard(snapshot, 0)._index
    assert quantizer is not None
    found = index.search(keys[::50], 20, 0, len(index), quantizer.assign(keys[::50]))
    by_itself = index.search(keys[::50], 20, 0, len(index))
    for theirs, own in zip(found, by_itself, strict=True):
        assert np.allclose(theirs, own)
    for around in (f"PCA32,{string}", string.replace("16", "16_HNSW8")):
        assert IndexSpec.of(MemorySection(index=f"factory:{around}"), 2000, 64).lists == 0


@pytest.mark.parametrize("string", ["PQ8x4", "PCA32,PQ8x4fs", "PQ8x4fs,RFlat", "IVF16,RQ4x4", "NSG16,Flat"])
def test_one_that_cannot_is_refused_before_a_text_is_embedded(string: str) -> None:
    with pytest.raises(ValueError, match=rf"memory\.index is 'factory:{string}': FAISS cannot search .* IVF"):
        IndexSpec.of(MemorySection(index=f"factory:{string}"), 700, 64)


@pytest.mark.parametrize("string", ["IVF1024,Flat", "PCA32,IVF1024,SQ8"])
def test_more_lists_than_keys_are_refused_before_a_text_is_embedded(string: str) -> None:
    with pytest.raises(ValueError, match=rf"memory\.index is 'factory:{string}': 1,024 .* the 700 keys.*: take 700"):
        IndexSpec.of(MemorySection(index=f"factory:{string}"), 700, 64)
    assert IndexSpec.of(MemorySection(index=f"factory:{string}"), 1024, 64).sample


@pytest.mark.parametrize("string", ["IVF16,PQ4x10", "PCA96,Flat"])
def test_what_cannot_be_trained_is_refused_with_the_reason(tmp_path: Path, string: str) -> None:
    keys = unit_rows(np.random.default_rng(0), 700, 64)
    with pytest.raises(ValueError, match=rf"'factory:{string}': FAISS cannot train it on 700 keys of 64 numbers: [NP]"):
        memory_of(keys, 400, 2, MemorySection(index=f"factory:{string}"), tmp_path)


@pytest.mark.parametrize("string", ["RaBitQfs", "IDMap2,IVF16,Flat"])
def test_what_only_a_trained_index_tells_is_refused_before_a_shard_is_built(tmp_path: Path, string: str) -> None:
    keys = unit_rows(np.random.default_rng(0), 700, 64)
    with pytest.raises(ValueError, match=rf"memory\.index is 'factory:{string}': FAISS cannot search .* IVF"):
        memory_of(keys, 400, 2, MemorySection(index=f"factory:{string}"), tmp_path)
    assert not list(tmp_path.rglob("index.faiss"))


def test_a_quantizer_travels_to_other_processes(tmp_path: Path) -> None:
    keys = unit_rows(np.random.default_rng(0), 300, 16)
    quantizer = publish_keys(
        tmp_path, keys, random_relevance(np.random.default_rng(0), 200, 100), 2, settings=MemorySection(index="ivf-pq")
    ).quantizer()
    assert quantizer is not None
    here, there = quantizer.assign(keys), pickle.loads(pickle.dumps(quantizer)).assign(keys)
    assert np.array_equal(here.lists_Bp, there.lists_Bp)
    assert np.array_equal(here.scores_Bp, there.scores_Bp)


def planned(**change: object) -> MemoryPlan:
    """The plan of LF-AmazonTitles-1.3M on two machines, with changes."""
    settings: dict = {
        "instances": 2_248_619,
        "labels": 1_305_265,
        "dimension": 768,
        "machines": 2,
        "machine_memory": 64 << 30,
        "machine_cpus": 16,
        "texts_per_second": 1000.0,
        "text_bytes": 80.0,
        "labels_per_instance": 22.2,
    }
    kind = str(change.pop("index", "ivf-pq"))
    return plan_memory(MemorySection(index=kind), **(settings | change))


def test_a_plan_fits_its_machines_or_says_what_would() -> None:
    plan = planned()
    assert plan.shards % 2 == 0, "as many on each machine"
    assert plan.shards * plan.shard_memory == pytest.approx(3_553_884 * (768 * 2 + 48 + 8), rel=0.1)
    assert planned(index="flat").shard_memory * planned(index="flat").shards > 1.7 * plan.shards * plan.shard_memory
    assert planned(machines=4).embed_hours == pytest.approx(plan.embed_hours / 2)
    assert planned(machine_cpus=1, machine_memory=64 << 30).shard_memory <= SHARD_LIMIT
    with pytest.raises(ValueError, match=r"flat keys take 10\.2 GiB.*2 machines have room for 5\.6: take 4 machines"):
        planned(index="flat", machine_memory=4 << 30)


@pytest.mark.parametrize(("kind", "number"), [("ivf-fp16", 8), ("ivf-pq", 4)])
def test_what_building_a_shard_takes_is_as_measured(kind: str, number: int) -> None:
    """number: bytes of one in a block at the peak."""
    measured = json.loads(MEASURED.read_text())["figures"][kind]["peak_of_one_writer_bytes"]
    keys = -(-3_550_000 // 8)
    spec = IndexSpec.of(MemorySection(index=kind), 3_550_000, 768)
    assert build_bytes(spec, keys, 8, 154 * keys) == pytest.approx(measured, rel=0.15)
    alone = build_bytes(spec, keys, 1, 0) - build_bytes(spec, keys, 8, 0)
    assert alone == pytest.approx(7 / 8 * BLOCK_KEYS * 768 * number), "fewer shards, more of a block is one's own"
    assert BLOCK_KEYS == BLOCK_UNITS * UNIT_KEYS


def test_a_plan_says_no_hours_that_nobody_knows() -> None:
    assert planned(index="hnsw").build_hours is None
    assert planned(index="factory:IVF64,Flat").build_hours is None
    assert (planned(index="flat").build_hours or 0) > 0.001
    assert planned(index="ivf-pq", machines=1, machine_cpus=2).build_hours == pytest.approx(660 / 3600, rel=0.5)


def test_a_kind_that_is_not_there_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"index must be one of flat.*found 'flatt'"):
        MemorySection(index="flatt")
    with pytest.raises(ValueError, match="lists is a setting of the ivf kinds, not of flat"):
        MemorySection(index="flat", lists=4)
    with pytest.raises(ValueError, match="probes is a setting"):
        MemorySection(index="flat-sq8", probes=4)
    with pytest.raises(ValueError, match=r"memory\.index is 'factory:IVFoo,SQ'.*could not parse"):
        IndexSpec.of(MemorySection(index="factory:IVFoo,SQ"), 100, 8)
    with pytest.raises(ValueError, match=r"memory\.probes is 4, and factory:SQ8 has no inverted lists: leave it out"):
        IndexSpec.of(MemorySection(index="factory:SQ8", probes=4), 100, 8)


@pytest.mark.parametrize(
    ("keys", "lists", "probes"), [(10, 8, 8), (27_582, 256, 32), (225_000, 1024, 32), (3_550_000, 4096, 128)]
)
def test_sizes_follow_from_the_number_of_keys(keys: int, lists: int, probes: int) -> None:
    spec = IndexSpec.of(MemorySection(index="ivf-pq"), keys, 768)
    assert (spec.lists, spec.probes, spec.subvectors) == (lists, probes, 96)


def test_rescoring_copies_the_candidates_only(tmp_path: Path) -> None:
    """In a file FAISS's keys begin anywhere; of numbers that are not aligned, NumPy's `take` copies all before it takes
    some."""
    rng, keys = np.random.default_rng(0), 20_000
    keys_ND, query = unit_rows(rng, keys, 64), unit_rows(rng, 1, 64)
    spec = IndexSpec(kind="flat", dimension=64)
    build_index(tmp_path, train_index(spec, keys_ND), spec, keys, lambda: [keys_ND])
    index = ShardIndex(tmp_path, spec, 1)
    tracemalloc.start()
    index.search(query, 10, 0, keys)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < keys_ND.nbytes / 10


def test_a_flat_answer_is_exact_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Below some number of queries FAISS reads all keys for each; from there on it takes a matrix product."""
    rng, keys, b = np.random.default_rng(0), 3000, 30
    keys_ND, queries = unit_rows(rng, keys, 96), unit_rows(rng, 300, 96)
    keys_ND[rng.integers(keys, size=keys // 3)] = keys_ND[0]
    queries[:100] = keys_ND[:100]
    spec = IndexSpec(kind="flat", dimension=96)
    build_index(tmp_path, train_index(spec, keys_ND), spec, keys, lambda: [keys_ND])
    index = ShardIndex(tmp_path, spec, 1)
    for start, stop in ((0, keys), (500, keys), (0, 500)):
        exact = (queries.astype(np.float64) @ keys_ND[start:stop].T.astype(np.float64)).astype(np.float32)
        expected = np.argsort(-exact, axis=1, kind="stable")[:, :b]
        for batch in (1, 20, 22, 150, 300):
            found = [index.search(queries[i : i + batch], b, start, stop) for i in range(0, 300, batch)]
            positions, scores = (np.concatenate(part) for part in zip(*found, strict=True))
            np.testing.assert_array_equal(positions, start + expected)
            np.testing.assert_array_equal(scores, np.take_along_axis(exact, expected, 1))


@pytest.mark.parametrize("probes", [1, 5, 64])
def test_which_lists_are_near_does_not_depend_on_the_batch(probes: int) -> None:
    """Vectors half-way between two centroids, of which FAISS takes the one or the other, as its blocks fall."""
    rng = np.random.default_rng(0)
    centroids = unit_rows(rng, 64, 96)
    centroids[1] = centroids[0]
    quantizer = faiss.IndexFlatIP(96)
    quantizer.add(centroids)
    between = centroids[rng.integers(64, size=500)] + centroids[rng.integers(64, size=500)]
    vectors = between / np.linalg.norm(between, axis=1, keepdims=True)
    exact = (vectors.astype(np.float64) @ centroids.T.astype(np.float64)).astype(np.float32)
    expected = np.sort(np.argsort(-exact, axis=1, kind="stable")[:, :probes], axis=1)
    for batch in (1, 7, 19, 20, 100, 500):
        found = [nearest_lists(quantizer, vectors[i : i + batch], probes)[0] for i in range(0, 500, batch)]
        np.testing.assert_array_equal(np.sort(np.concatenate(found), axis=1), expected)
