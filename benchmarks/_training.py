"""What the benchmarks of training share: a trainer's steady rate, and how good the encoder is that it makes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.evaluation.sweep import FIGURES, choose, grid, sweep
from raexmc_ray.files import Folder
from raexmc_ray.local import Memory, open_memory
from raexmc_ray.memory.write import build_memory
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.curves import read_curves
from raexmc_ray.train.meter import PARTS
from raexmc_ray.train.trainer import run_folder, run_key, train

LAMBDAS = (0.3, 0.4, 0.5, 0.6, 0.7)
TEMPERATURES = (0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15)
RECIPE = Path(__file__).parent.parent / "jobs/recipes/debian_related.yaml"
WARM_UP = 3
"""Steps that are not counted."""


def trainer_rate(name: str, overrides: list[str]) -> dict[str, Any]:
    """{"texts_per_s", "padding", "share_data", …} of a whole training by Ray Train, its first steps aside.

    A text here is an instance, with the labels that are drawn for it. The training is run anew.
    """
    recipe = Recipe.load(RECIPE, [f"cluster.storage=runs/benchmark/{name}", *overrides])
    shutil.rmtree(recipe.cluster.storage, ignore_errors=True)
    corpus = cut(read_corpus(recipe.corpus.path, recipe.corpus.fields))
    train(recipe, corpus)
    lines = [line for line in read_curves(run_of(recipe, corpus)) if "loss" in line][WARM_UP:]
    seconds = [1 / line["texts_per_s"] for line in lines]  # of one text; every line is a step of as many texts
    figures = {"texts_per_s": round(len(seconds) / sum(seconds), 1)}
    for part in ("padding", *(f"share_{part}" for part in PARTS)):
        weighed = sum(line[part] * s for line, s in zip(lines, seconds, strict=True)) / sum(seconds)
        figures[part] = round(weighed, 4)
    return figures


def chosen_on(corpus: Corpus, encoder: TextEncoder, recipe: Recipe) -> tuple[float, float, dict[str, float]]:
    """(λ, τ, figures) chosen on the test part of `corpus`, which stands for rows held out of the training."""
    memory = memory_of(corpus, encoder, recipe)
    swept = sweep(memory, corpus, recipe.corpus, grid(recipe.prediction, LAMBDAS, TEMPERATURES))
    chosen = choose(swept)
    return chosen.lambda_, chosen.temperature, five(swept[chosen])


def memory_of(corpus: Corpus, encoder: TextEncoder, recipe: Recipe) -> Memory:
    """A memory of one shard in this process, in a folder that is put anew."""
    folder = Path(recipe.cluster.storage) / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    build_memory(corpus, encoder, folder, recipe.memory.model_copy(update={"shards": 1}), recipe.prediction)
    return open_memory(folder)


def five(figures: Mapping[str, float]) -> dict[str, float]:
    """The five figures, rounded."""
    return {name: round(figures[name], 2) for name in FIGURES}


def cut(corpus: Corpus, rows: int = 3840) -> Corpus:
    """The corpus with its first training rows only: 15 steps of 256."""
    return Corpus(corpus.train.take(np.arange(rows)), corpus.test, corpus.labels)


def run_of(recipe: Recipe, corpus: Corpus) -> Folder:
    return run_folder(recipe, run_key(recipe, corpus))
