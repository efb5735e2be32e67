"""A recipe is typed, closed to what it does not know, and says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from raexmc_ray.recipe import Neighbours, Recipe

SMALLEST = {"corpus": {"path": "x"}}


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.dump())
    assert Recipe.load(copy) == recipe


@pytest.mark.parametrize("who", ["key:secret@", "key:s%2Fecret@", "secret@", ""])
def test_what_is_written_of_a_recipe_has_no_credentials(who: str) -> None:
    recipe = Recipe.parse({**SMALLEST, "cluster": {"storage": f"s3://{who}bucket/a@b?region=eu-west-1"}})
    record = recipe.record()
    assert record["cluster"]["storage"] == "s3://bucket/a@b?region=eu-west-1"
    assert Recipe.parse(record).training == recipe.training
    assert Recipe.parse(dict(SMALLEST)).record() == Recipe.parse(dict(SMALLEST)).model_dump(mode="json", by_alias=True)


def test_the_temperature_is_the_trainings_unless_it_is_set() -> None:
    """τ is the same in training and prediction unless set."""
    corpus = {"corpus": {"path": "x"}}
    for settings, overrides, expected in (
        ({}, [], (0.05, 0.05)),
        ({}, ["training.temperature=0.02"], (0.02, 0.02)),
        ({"training": {"temperature": 0.02}, "prediction": {"k": 5}}, [], (0.02, 0.02)),
        ({"training": {"temperature": 0.02}}, ["prediction.temperature=0.1"], (0.02, 0.1)),
        ({}, ["prediction.temperature=0.1"], (0.05, 0.1)),
    ):
        recipe = Recipe.parse(corpus | settings, overrides)
        assert (recipe.training.temperature, recipe.prediction.temperature) == expected
        assert Recipe.parse(recipe.model_dump(by_alias=True)) == recipe


def test_overrides_reach_any_depth() -> None:
    overrides = ["training.epochs=3", "training.objective.instances=none", "prediction.neighbours={joint: 50}"]
    recipe = Recipe.parse(dict(SMALLEST), overrides)
    assert recipe.training.epochs == 3
    assert recipe.training.objective.instances == "none"
    assert recipe.prediction.neighbours == Neighbours(joint=50)


@pytest.mark.parametrize(
    ("settings", "overrides", "says"),
    [
        ({}, [], "corpus: this setting is required"),
        ({**SMALLEST, "trainig": {}}, [], "trainig: unknown setting; did you mean training?"),
        (SMALLEST, ["training.epoch=3"], "training.epoch: unknown setting; did you mean epochs?"),
        (SMALLEST, ["training.epochs=0"], "training.epochs"),
        (SMALLEST, ["training.learning_rate=.nan"], "training.learning_rate"),
        (SMALLEST, ["training.batch_size=33"], "multiple of cluster.workers"),
        (SMALLEST, ["training.objective={instances: none, shared: voting}"], "set instances to in_batch"),
        (SMALLEST, ["training.evaluation.metric=P@2"], "metric must be one of P@1, P@3"),
        (SMALLEST, ["training.evaluation.patience=3"], "patience is 3, and every is 0"),
        (SMALLEST, ["prediction.lambda=1.1"], "prediction.lambda"),
        (SMALLEST, ["prediction.neighbours={joint: 5, labels: 5}"], "not both"),
        (SMALLEST, ["prediction.neighbours={}"], "give `joint`"),
        (SMALLEST, ["corpus.fields=[title, title]"], "each once"),
        (SMALLEST, ["epochs=3"], "section.field=value"),
        (SMALLEST, ["training.epochs"], "section.field=value"),
        (SMALLEST, ["corpus.path.deeper=3"], "is not a section"),
        (SMALLEST, ["training.epochs=[1"], "not YAML"),
        (["a"], [], "mapping of sections"),
    ],
)
def test_what_is_wrong_is_said(settings: dict, overrides: list[str], says: str) -> None:
    import copy

    with pytest.raises(ValueError) as error:
        Recipe.parse(copy.deepcopy(settings), overrides)
    assert says in str(error.value)


def test_a_section_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """YAML would take the last."""
    (tmp_path / "r.yaml").write_text("corpus: {path: x}\ntraining: {epochs: 3}\nmemory: {}\ntraining: {seed: 1}\n")
    with pytest.raises(ValueError, match=r"r\.yaml: this is not YAML: training is there twice\n.*line 4"):
        Recipe.load(tmp_path / "r.yaml")


def test_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--recipe"):
        Recipe.load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("corpus: [")
    with pytest.raises(ValueError, match=r"broken\.yaml: this is not YAML"):
        Recipe.load(broken)
