"""A training prints its plan first, and what cannot work is refused at once, with the remedy."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny_settings
from helpers import MODEL

from raexmc_ray.corpus import read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.plan import Plan, refuse, warn_of_idle, worker_bytes
from raexmc_ray.train.trainer import train


def test_the_plan_has_every_number(tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), ["training.mining.labels=2", "training.epochs=9"])
    said = str(Plan(recipe, instances=240, steps_an_epoch=7, parameters=13_700_000, memory_bytes=3 << 30))
    for part in ("2 with 1 CPU", "32 instances", "16 a worker", "63: 9 epochs of 7", "240 instances", "13.7 million",
                 "3.0 GiB", "decoupled", "2 mined labels"):  # fmt: skip
        assert part in said, part


def test_the_estimate_of_memory_follows_the_settings(tiny_corpus: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.load(MODEL, layers=2)

    def estimate(*overrides: str, keys: int = 1000) -> int:
        recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), list(overrides))
        return worker_bytes(encoder, recipe, instances=keys, labels=keys // 2)

    batch, cache = "training.batch_size=4096", "training.gradient_cache=true"
    plain, cached = estimate(batch, keys=10_000), estimate(batch, cache, keys=10_000)
    assert cached < plain / 3
    assert estimate(batch, "cluster.workers=4", "cluster.cpus_per_worker=1", keys=10_000) < plain
    assert estimate(batch, cache, "training.chunk_size=128", keys=10_000) > cached

    large, larger = (
        estimate(
            f"training.batch_size={batch}",
            f"cluster.workers={batch // 4096}",
            "training.gradient_cache=true",
            keys=1_000_000,
        )
        for batch in (65_536, 131_072)
    )
    keys = 2 * 65_536  # more: of each an embedding and its gradient, of its own and gathered, and 64 similarities
    assert larger - large == keys * (encoder.width * 4 * 4 + 64 * 12 * 4)

    few, many = (estimate(f"training.positives_per_instance={number}", keys=200) for number in (10, 1000))
    assert few == many, "there are 100 labels in all"

    millions, mined = 10_000_000, ("training.mining.batches=neighbours", "training.mining.group=2")
    assert estimate(keys=millions) == estimate()
    embedded = millions / 2 * encoder.width * 4  # by each of two workers, of the instances
    assert 2 * embedded < estimate(*mined, keys=millions) < 4 * embedded
    assert estimate(*mined, keys=millions) < estimate("training.evaluation.every=1", *mined, keys=millions)
    assert estimate(*mined, keys=millions) > estimate(*mined, "cluster.workers=4", keys=millions)


@pytest.mark.parametrize(
    ("batch", "cached", "mib"), [(256, True, 1440), (4096, True, 1502), (256, False, 1909), (1024, False, 3384)]
)
def test_the_estimate_of_memory_is_near_what_was_measured(batch: int, cached: bool, mib: int) -> None:
    """By benchmarks/gradient_cache.py, in bfloat16."""
    settings = [f"training.batch_size={batch}", f"training.gradient_cache={str(cached).lower()}", "cluster.workers=1"]
    recipe = Recipe.load(ROOT / "jobs/recipes/debian_related.yaml", [*settings, "training.precision=bfloat16"])
    encoder = TextEncoder.load(MODEL, layers=recipe.encoder.layers, max_tokens=recipe.encoder.max_tokens)
    assert worker_bytes(encoder, recipe, instances=23_000, labels=7_000) / 2**20 == pytest.approx(mib, rel=0.25)


def test_settings_that_do_nothing_are_told(tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["training.mining.depth=7", "training.evaluation.holdout=0.2", "training.evaluation.metric=PSP@1"]
    training = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), overrides).training
    warn_of_idle(training)
    assert caplog.messages == [
        "training.mining.depth is 7, and does nothing: training.mining.labels is 0",
        "training.evaluation.holdout is 0.2, and does nothing: training.evaluation.every is 0",
        "training.evaluation.metric is PSP@1, and does nothing: training.evaluation.every is 0",
    ]
    warn_of_idle(training.model_copy(update={"evaluation": training.evaluation.model_copy(update={"every": 1})}))
    assert len(caplog.messages) == 4


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cluster.gpu=true"], r"a training worker wants 1 CPU and 1 GPU on one .* and 0 GPU: .*cluster\.gpu=false"),
        (["cluster.cpus_per_worker=64"], r"wants 64 CPU on one node, .* has 4 CPU: .*cluster\.cpus_per_worker"),
        (["encoder.model=/no/such/model"], r"encoder\.model is /no/such/model, and there is no model there"),
        (["encoder.layers=40"], r"encoder\.layers is 40"),
        (["encoder.max_tokens=513"], r"encoder\.max_tokens is 513, but package:\w+ takes 512 at most: set it to 512"),
        (["training.batch_size=10000"], r"only 240 training instances have a label: make the batch smaller"),
        (
            ["training.batch_size=240", "training.evaluation.every=1"],
            r"only 228 training instances have a label and are not held out for training\.evaluation: make the batch",
        ),
        (
            ["training.evaluation.every=1", "training.evaluation.holdout=0.001"],
            r"training\.evaluation\.holdout is 0\.001, and of the 0 rows held out none has a label .*: make it larger",
        ),
        (
            ["training.evaluation.every=1", "corpus.propensity_b=0"],
            r"corpus\.propensity_b is 0, and a label without a training instance",
        ),
        (
            ["cluster.storage=mock:///run"],
            r"is mock://run, .* checkpoints in a folder: set it to one",
        ),
        (["cluster.storage=/proc/nowhere"], r"cluster\.storage is /proc/nowhere, and it cannot be written to"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    overrides: list[str], says: str, ray_cluster: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), overrides)
    corpus = read_corpus(recipe.corpus.path)
    started = time.monotonic()
    with pytest.raises(ValueError, match=says):
        train(recipe, corpus)
    assert time.monotonic() - started < 20, "before any worker is started"


@pytest.mark.parametrize("labelled", [0, 1])
def test_no_smaller_batch_is_asked_for_than_there_can_be(labelled: int, tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path))
    with pytest.raises(ValueError, match=f"only {labelled} training instances have a label: .*raexmc build --encoder"):
        refuse(recipe, labelled)


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["depth=50", "group=4", "every=2"], ["depth is 50", "group is 4", "every is 2"]),
        (["depth=50", "group=4", "every=2", "batches=neighbours"], ["depth is 50"]),
        (["depth=50", "group=4", "every=2", "labels=1"], ["group is 4"]),
        (["depth=100", "group=8", "every=1"], []),  # as they are by default
    ],
)
def test_settings_of_mining_that_do_nothing_are_said(
    overrides: list[str], idle: list[str], tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [f"training.mining.{one}" for one in overrides]
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), [*settings, "training.batch_size=10000"])
    with pytest.raises(ValueError, match="make the batch smaller"):
        train(recipe, read_corpus(recipe.corpus.path))
    said = [record.message.split(", and does nothing: training.mining.")[0] for record in caplog.records]
    assert sorted(said) == [f"training.mining.{one}" for one in sorted(idle)]


def node(labels: dict[str, str] | None = None, **resources: float) -> dict:
    return {"Resources": resources, "Labels": labels or {}}


@pytest.mark.parametrize(
    ("nodes", "overrides", "found"),
    [
        (
            [node(CPU=4), node(CPU=4)],
            ["cluster.workers=1", "cluster.cpus_per_worker=8"],
            "the node that comes nearest has 4 CPU",
        ),
        ([node(CPU=4), node(CPU=4)], ["cluster.workers=4", "cluster.cpus_per_worker=2.5"], "there is room for 2 of 4"),
        ([node(CPU=9), node(CPU=1, GPU=2)], ["cluster.gpu=true"], "there is room for 1 of 2"),
        ([node(CPU=4), node(CPU=4)], ["cluster.workers=2", "cluster.cpus_per_worker=4"], None),
        ([node(CPU=0.3), node(CPU=0.1)], ["cluster.workers=4", "cluster.cpus_per_worker=0.1"], None),
        ([node(CPU=9), node(CPU=8, GPU=2)], ["cluster.gpu=true", "cluster.cpus_per_worker=4"], None),
    ],
)
def test_a_worker_must_find_room_on_one_node(
    nodes: list[dict],
    overrides: list[str],
    found: str | None,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raexmc_ray.cluster.living_nodes", lambda: nodes)
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), overrides)
    if found is None:
        refuse(recipe, 240)
    else:
        with pytest.raises(ValueError, match=f"{found}: lower cluster"):
            refuse(recipe, 240)


def test_a_cluster_that_may_grow_is_waited_for(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`ray up cluster.yaml` starts with its head alone; nodes with GPUs come when they are asked for."""
    head = node({"ray.io/node-group": "head"}, CPU=16)
    monkeypatch.setattr("raexmc_ray.cluster.living_nodes", lambda: [head])
    refuse(Recipe.parse(tiny_settings(tiny_corpus, tmp_path), ["cluster.gpu=true"]), 240)
    assert "nearest has 16 CPU and 0 GPU: lower cluster.workers" in caplog.text
    assert "unless the cluster adds such a node: waiting for one" in caplog.text


@pytest.mark.ray
def test_a_run_prints_its_plan_and_its_hours(
    ray_cluster: str, tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path, workers=1), ["training.mining.batches=neighbours"])
    with caplog.at_level(logging.INFO, "raexmc_ray"):
        train(recipe, read_corpus(recipe.corpus.path))
    assert "steps       14: 2 epochs of 7, over 240 instances" in caplog.text
    assert re.search(r"about 0\.\d\d hours more, at \d+ texts/s, beside mining\n", caplog.text)


@pytest.mark.ray
def test_the_plan_is_printed_before_texts_are_tokenised(
    ray_cluster: str,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("raexmc_ray.train.trainer.tokenize_on_cluster", stop)
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), ["training.evaluation.every=1"])
    with caplog.at_level(logging.INFO, "raexmc_ray"), pytest.raises(InterruptedError):
        train(recipe, read_corpus(recipe.corpus.path))
    assert "over 228 instances" in caplog.text
