"""A run that stops anywhere and goes on ends with the same bits as one that never stopped; a loss that is not
finite ends it; what it evaluates decides which encoder it gives. In one process, without Ray."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_settings
from helpers import MODEL

from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.curves import draw_curves, read_curves
from raexmc_ray.train.loop import Loop, NonFiniteLossError, State
from raexmc_ray.train.mining import embed_part
from raexmc_ray.train.trainer import run_key, training_data
from raexmc_ray.train.validate import validate
from raexmc_ray.train.worker import flatten, make_encoder, unflatten

EVERYTHING = [
    "cluster.workers=1",
    "cluster.checkpoint_every=3",
    "training.dropout=0.1",
    "training.gradient_cache=true",
    "training.chunk_size=16",
    "training.mining={batches: neighbours, labels: 2, every: 2, group: 4}",
    "training.evaluation={every: 1, holdout: 0.2}",
]


class StoppedError(Exception):
    """What takes the place of a kill."""


def run(
    corpus: Path, folder: Path, overrides: list[str], stop_at: int | None = None, told: list[dict] | None = None
) -> tuple[Loop, State]:
    """The run in `folder`, or its next life. told: gets what it reports."""
    recipe = Recipe.parse(tiny_settings(corpus, folder), overrides)
    encoder = make_encoder(recipe, torch.device("cpu"))

    def report(step: int, figures: dict[str, float]) -> None:
        if told is not None:
            told.append({"step": step, **figures})
        if step == stop_at and "loss" in figures:
            raise StoppedError

    data = unflatten(flatten(training_data(recipe, read_corpus(corpus), encoder)))
    loop = Loop(recipe, data, encoder, Folder.at(folder), report)
    try:
        return loop, loop.run()
    finally:
        loop.checkpoints.wait()


def weights(encoder: TextEncoder) -> torch.Tensor:
    return torch.cat([p.detach().ravel() for p in encoder.parameters()])


@pytest.fixture(scope="module")
def undisturbed(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loop, State]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *run(tiny_corpus, folder, EVERYTHING)


@pytest.mark.parametrize("stops", [[1], [5, 8], [11]])
def test_going_on_changes_no_bit(stops: list[int], undisturbed: tuple, tiny_corpus: Path, tmp_path: Path) -> None:
    folder, loop, state = undisturbed
    assert state.step == loop.steps == 12, "two epochs of six"
    for stop in stops:
        with pytest.raises(StoppedError):
            run(tiny_corpus, tmp_path, EVERYTHING, stop)
    again, ended = run(tiny_corpus, tmp_path, EVERYTHING)
    assert ended == state
    assert torch.equal(weights(again.encoder), weights(loop.encoder)), "bit for bit"
    lines, expected = read_curves(Folder.at(tmp_path)), read_curves(Folder.at(folder))
    assert [line["step"] for line in lines] == [line["step"] for line in expected], "no step twice, none missing"
    for name in ("loss", "P@1", "R@10"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in expected]


def test_a_finished_run_is_not_run_again(undisturbed: tuple, tiny_corpus: Path) -> None:
    folder, loop, state = undisturbed
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    again, ended = run(tiny_corpus, folder, EVERYTHING, stop_at=state.step)
    assert ended == state
    assert torch.equal(weights(again.encoder), weights(loop.encoder))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names


def test_it_tells_when_it_mines_and_evaluates(tiny_corpus: Path, tmp_path: Path) -> None:
    told: list[dict] = []
    short = ["cluster.workers=1", "training.epochs=1", "training.mining.labels=2", EVERYTHING[-1]]
    run(tiny_corpus, tmp_path, short, told=told)
    mined, evaluated = ([(t["step"], t[name]) for t in told if name in t] for name in ("mining", "evaluation"))
    assert mined == [(0, 1), (0, 0)]
    assert evaluated == [(6, 1), (6, 0)]


def test_the_best_checkpoint_is_kept_and_named(undisturbed: tuple) -> None:
    folder, loop, state = undisturbed
    measured = {line["step"]: line["P@1"] for line in read_curves(Folder.at(folder)) if "P@1" in line}
    assert sorted(measured) == [6, 12]
    assert state.best == max(measured.values()) == measured[state.best_step]
    best = loop.checkpoints.open(state.best_step)
    assert best is not None
    assert best.state["best_step"] == state.best_step


def test_held_out_labels_only_are_ranked_by_similarity_at_any_temperature(undisturbed: tuple) -> None:
    _, loop, _ = undisturbed
    keys = [embed_part(loop.encoder, tokens, 64) for tokens in (loop.data.instances, loop.data.labels)]

    def measured(temperature: float) -> dict[str, float]:
        recipe = Recipe.parse(loop.recipe.model_dump(by_alias=True), [f"prediction.temperature={temperature}"])
        figures = validate(loop.encoder, loop.data.held_out, *keys, loop.data.relevance, recipe)
        return {name: value for name, value in figures.items() if "labels only" in name}

    assert measured(0.001) == measured(0.08)


def test_the_curves_can_be_looked_at(undisturbed: tuple) -> None:
    folder, _, _ = undisturbed
    lines = read_curves(Folder.at(folder))
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    for line in trained:
        shares = [value for name, value in line.items() if name.startswith("share_")]
        assert 0.5 < sum(shares) <= 1.01, "the parts of a step make up its time"
        assert 0 <= line["padding"] < 0.5
    picture = draw_curves(lines, "P@1")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 13))
    assert len(board.Scalars("P@1")) == 2


def test_what_no_run_can_go_on_from_is_deleted(tiny_corpus: Path, tmp_path: Path) -> None:
    """Four epochs of six steps, of which the first is the best: its checkpoint stays, and a run that went on from it
    would look for new neighbours. Of the others only step 15's is there as the last epoch begins."""
    overrides = ["cluster.workers=1", "cluster.checkpoint_every=5", "cluster.checkpoints_kept=1", "training.epochs=4"]
    overrides += ["training.mining.batches=neighbours", "training.learning_rate=1e-9"]
    _, state = run(tiny_corpus, tmp_path, [*overrides, "training.evaluation={every: 1, holdout: 0.2}"])
    assert state.best_step == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000024"]
    kept = sorted(path.name for path in (tmp_path / "mined").iterdir())
    assert kept == ["epoch-00002.safetensors", "epoch-00003.safetensors"]


def test_it_stops_early_where_nothing_gets_better(tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = [
        "cluster.workers=1",
        "training.epochs=30",
        "training.learning_rate=1e-9",
        "training.evaluation={every: 1, holdout: 0.2, patience: 2}",
    ]
    loop, state = run(tiny_corpus, tmp_path, overrides)
    assert state.finished
    assert state.step == 3 * loop.sampler.steps, "the first is the best, and two are no better"
    assert state.best_step == loop.sampler.steps
    assert run(tiny_corpus, tmp_path, overrides)[1] == state, "and stays stopped"


@pytest.mark.parametrize("where", ["loss", "gradient", "update"])
def test_what_is_not_finite_ends_the_run(
    where: str, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "gradient":
        monkeypatch.setattr("raexmc_ray.train.loop.UIDS_SAID", 20)
    overrides = ["cluster.workers=1", "cluster.checkpoint_every=2", "training.evaluation={every: 9, holdout: 0.2}"]
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), overrides)
    encoder = make_encoder(recipe, torch.device("cpu"))

    def poison(step: int, figures: dict[str, float]) -> None:
        weight = next(encoder.parameters())
        if step == 3 and where == "loss":
            weight.data.fill_(np.nan)
        elif step == 3 and where == "update":  # of a step in which a checkpoint is due
            loop.optimizer.register_step_post_hook(lambda *_: weight.data[0].fill_(np.nan))
        elif step == 3:
            list(encoder.parameters())[-1].register_hook(lambda gradient: gradient * np.inf)

    corpus = read_corpus(tiny_corpus)
    loop = Loop(recipe, training_data(recipe, corpus, encoder), encoder, Folder.at(tmp_path), poison)
    with pytest.raises(NonFiniteLossError) as error:
        loop.run()
    said = str(error.value)
    broken = {
        "loss": "not finite in step 4, for step 3 has broken the weights",
        "gradient": "not finite in step 4;",
        "update": "weights are not finite after step 4;",
    }
    assert broken[where] in said
    kept = np.setdiff1d(np.arange(len(corpus.train)), corpus.held_out_places(0.2, seed=1))
    uids = corpus.train.texts["uid"].take(kept[loop.sampler.rows(0, 2 if where == "loss" else 3)]).to_pylist()
    some = f"{json.dumps(uids[:20])} and 12 more, all in {tmp_path}/broken-batch.json"
    assert (some if where == "gradient" else json.dumps(uids)) in said, "what is in the batch, as the corpus names it"
    assert json.loads((tmp_path / "broken-batch.json").read_text()) == uids
    assert str(tmp_path / "checkpoints/step-00000002") in said, "the last good checkpoint"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"], "and no other"


def test_whatever_a_run_follows_from_names_it(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus, model = read_corpus(tiny_corpus), tmp_path / "model"
    encoder = TextEncoder.load(MODEL, layers=1)
    encoder.save(model)

    def key(*overrides: str, corpus: Corpus = corpus) -> str:
        settings = tiny_settings(tiny_corpus, tmp_path)
        return run_key(Recipe.parse(settings, [f"encoder.model={model}", *overrides]), corpus)

    filtered = replace(corpus, train=replace(corpus.train, filtered=corpus.train.relevance))
    unwatched, watch = key(), "training.evaluation.every=1"
    watched = [
        key(watch),
        key(watch, "corpus.propensity_a=0.6"),
        key(watch, "corpus.propensity_b=2.6"),
        key(watch, "prediction.lambda=0.4"),
        key(watch, corpus=filtered),
    ]
    assert len({unwatched, *watched}) == 6, "what the held-out figures follow from chooses the encoder"
    assert key("corpus.propensity_a=0.6", corpus=filtered) == unwatched, "where there are any"
    embedded = [key("encoder.batch_size=32", on) for on in (watch, "training.mining.labels=1")]
    assert len({unwatched, key(watch), key("training.mining.labels=1"), *embedded}) == 5
    idle = ["encoder.batch_size=32", "training.mining={group: 4, depth: 50, every: 2}", "prediction.k=5"]
    idle.append("training.evaluation={holdout: 0.3, metric: P@5}")
    assert {key(setting) for setting in idle} == {unwatched}, "what does nothing is left out"
    assert key(watch, "prediction.k=5") == key(watch)
    (model / "README.md").write_text("about it")
    assert key() == unwatched
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1
    encoder.save(model)
    assert key() != unwatched, "other weights in the same folder"


@pytest.mark.slow
def test_a_compiled_encoder_trains_alike(tiny_corpus: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    once = ["cluster.workers=1", "training.epochs=1", "training.batch_size=80", "training.dropout=0"]
    run(tiny_corpus, tmp_path / "plain", once)
    run(tiny_corpus, tmp_path / "compiled", [*once, "training.compile=true"])
    losses = [[line["loss"] for line in read_curves(Folder.at(tmp_path / name))] for name in ("plain", "compiled")]
    assert len(losses[0]) > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_goes_on_in_the_precision_in_which_it_began(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["cluster.workers=1", "cluster.checkpoint_every=1", "training.epochs=1", "training.batch_size=80"]
    monkeypatch.setattr("raexmc_ray.train.loop.bfloat16_is_native", lambda device: True)
    with pytest.raises(StoppedError):
        run(tiny_corpus, tmp_path, overrides, stop_at=2)
    monkeypatch.setattr("raexmc_ray.train.loop.bfloat16_is_native", lambda device: False)
    loop, state = run(tiny_corpus, tmp_path, overrides)
    assert (loop.encoder.precision, state.precision) == ("bfloat16", "bfloat16")
    assert run(tiny_corpus, tmp_path / "other", overrides)[1].precision == "float32"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_tower_computes_in_the_precision_that_is_set(precision: str, tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = ["cluster.workers=1", "training.epochs=1", "training.batch_size=120"]
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path), [*overrides, f"training.precision={precision}"])
    encoder, computed = make_encoder(recipe, torch.device("cpu")), set()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, states: computed.add(states.dtype))
    data = training_data(recipe, read_corpus(tiny_corpus), encoder)
    before = weights(encoder)
    state = Loop(recipe, data, encoder, Folder.at(tmp_path), lambda step, figures: None).run()
    assert state.step == 2
    assert computed == {getattr(torch, precision)}
    losses = [line["loss"] for line in read_curves(Folder.at(tmp_path))]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}, "weights and gradients are not reduced"
    assert not torch.equal(weights(encoder), before)
