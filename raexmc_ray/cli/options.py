"""Options that several commands have, and the recipe that they are read from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raexmc_ray.cli.output import console
from raexmc_ray.recipe import Recipe

if TYPE_CHECKING:
    from raexmc_ray.corpus import Corpus

RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="YAML file with every setting of the run.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a setting: section.field=value. May be repeated.")
]


def read_run(recipe: Path, overrides: list[str]) -> tuple[Recipe, Corpus]:
    """The recipe with its overrides, and its corpus, about which a line is printed."""
    from raexmc_ray.corpus import read_corpus

    settings = Recipe.load(recipe, overrides)
    corpus = read_corpus(settings.corpus.path, settings.corpus.fields, settings.corpus.holdout)
    console.print(f"corpus: {corpus.describe()}", soft_wrap=True, highlight=False)
    return settings, corpus
