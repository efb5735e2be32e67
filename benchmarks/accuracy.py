"""How good the whole method gets on the two shipped corpora, and which step helped.

Each corpus's recipe is trained on all training rows, and measured once on the test part, at the λ and τ that a small
run of the same recipe chose on held-out rows of the same corpus. The ladder: on `debian-related`, each step is trained
on 80% of the training rows and measured on the other 20%, each at its own best λ and τ there.

"After debian-depends" is a training that goes on from an encoder that was trained on the other corpus, which tells what
packages need, and not what they go with. No row that is measured on is among its training rows: both corpora are split
by package, and where rows are held out for the ladder, they are left out of both.

The best figures of the classical methods are quoted from the corpora's description: TF-IDF over instances and labels,
and PECOS XR-Linear, each at its own best setting. Trainings that are finished are not repeated: stopped, the same
command goes on. Corpora and steps that are named are measured alone; each figure tells the commit that it is of.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from _result import RESULTS, at_least, commit, print_targets, write_result
from _training import RECIPE, chosen_on, five, memory_of

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.evaluation import evaluate
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.trainer import train, trained_encoder

ONE_WORKER = ["cluster.workers=1", "cluster.cpus_per_worker=2", "cluster.storage=runs/accuracy"]
SMALL = ["encoder.layers=2", "training.epochs=2", "training.learning_rate=3.0e-4"]
NEIGHBOURS = "training.mining.batches=neighbours"
MINED = "training.mining.labels=1"
VOTING = "training.objective.shared=voting"
LEXICAL = ["memory.lexical.weight=0.4", "memory.lexical.dimension=1024"]
SIX_LAYERS = ["encoder.layers=6", "training.epochs=3", "training.learning_rate=2.0e-4", VOTING]
LESS_LEXICAL = [*LEXICAL, "memory.lexical.weight=0.3"]
FIFTY = "prediction.neighbours={instances: 50, labels: 50}"
AFTER_DEPENDS = "debian-related, after debian-depends"
BATCHES = [*SIX_LAYERS, *LESS_LEXICAL, FIFTY]
SMALL_STEPS: dict[str, list[str]] = {
    "voting instances, lexical part": [VOTING, *LEXICAL],
    "voting instances, lexical part of 0.3": [VOTING, *LESS_LEXICAL],
    "the same, 50 neighbours of each kind": [VOTING, *LESS_LEXICAL, FIFTY],
    "voting instances": [VOTING],
    "random batches of 256": [],
    "random batches, lexical part": LEXICAL,
    "neighbour batches": [NEIGHBOURS],
    "mined labels": [MINED],
    "neighbour batches, mined labels": [NEIGHBOURS, MINED],
    "neighbour batches, voting": [NEIGHBOURS, VOTING],
    "batches of 512": ["training.batch_size=512"],
    "three positives an instance": ["training.positives_per_instance=3"],
    "6 layers, 3 epochs, voting": SIX_LAYERS,
    "6 layers, 3 epochs, voting, lexical part": [*SIX_LAYERS, *LEXICAL],
    "6 layers, 6 epochs, voting, lexical part": [*SIX_LAYERS, *LEXICAL, "training.epochs=6"],
    "6 layers, 6 epochs, voting, lexical part, dropout": [
        *SIX_LAYERS,
        *LEXICAL,
        "training.epochs=6",
        "training.dropout=0.1",
    ],
    "6 layers, 3 epochs, batches of 256": BATCHES,
    "6 layers, 3 epochs, batches of 128": [*BATCHES, "training.batch_size=128"],
    "6 layers, 3 epochs, batches of 64": [*BATCHES, "training.batch_size=64"],
    "6 layers, 6 epochs, dropout, batches of 128": [
        *BATCHES,
        "training.batch_size=128",
        "training.epochs=6",
        "training.dropout=0.1",
    ],
    "random batches of 256, another seed": ["training.seed=1"],
    "after debian-depends": [VOTING, *LESS_LEXICAL, FIFTY],
    "6 layers, 3 epochs, after debian-depends": BATCHES,
}
"""On `debian-related`."""
FIRST = {"after debian-depends": SMALL, "6 layers, 3 epochs, after debian-depends": []}
"""What is set in the recipe of `debian-depends`, for the training that a step goes on from."""
BEST = {
    "debian-related": RECIPE.with_name("debian_related_best.yaml"),
    "debian-depends": RECIPE.with_name("debian_depends_best.yaml"),
    AFTER_DEPENDS: RECIPE.with_name("debian_related_best.yaml"),
}
RESULT = RESULTS / "accuracy.json"
RELATED = {"P@1": 56.0, "P@5": 22.5, "PSP@1": 38.0, "PSP@5": 43.0, "R@10": 66.5}
WANTED = {
    "debian-related": RELATED,
    AFTER_DEPENDS: RELATED,
    "debian-depends": {"P@1": 52.4, "P@5": 24.8, "PSP@1": 36.3, "PSP@5": 37.1, "R@10": 54.1},
}
"""On `debian-depends`: the better of TF-IDF "both" and PECOS XR-Linear."""


def step(path: Path, overrides: list[str], first: list[str] | None) -> dict[str, Any]:
    """{"lambda", "temperature", five figures, "train_s"} of a small run, on held-out training rows."""
    recipe = Recipe.load(path, [*SMALL, *ONE_WORKER, *overrides])
    corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields, 0.2)
    encoder, seconds = trained(recipe, corpus, first)
    lambda_, temperature, figures = chosen_on(corpus, encoder, recipe)
    return {"lambda": lambda_, "temperature": temperature, **figures, "train_s": seconds}


def best(path: Path, chosen: dict[str, Any], first: list[str] | None) -> dict[str, Any]:
    """{row: five figures on the test part, "train_s"} of a recipe trained on all training rows."""
    settings = [f"prediction.{name}={chosen[name]}" for name in ("lambda", "temperature")]
    recipe = Recipe.load(path, [*ONE_WORKER, *settings])
    corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields)
    encoder, seconds = trained(recipe, corpus, first)
    table = evaluate(memory_of(corpus, encoder, recipe), corpus, recipe.corpus, recipe.prediction).table
    rows = {row: five(table[row]) for row in ("labels only", "instances only", "both")}
    return {"lambda": chosen["lambda"], "temperature": chosen["temperature"], **rows, "train_s": seconds}


def trained(recipe: Recipe, corpus: Corpus, first: list[str] | None) -> tuple[TextEncoder, list[float | None]]:
    """The encoder, and the seconds that each training took: None where it was trained before.

    first: where the training goes on from one on `debian-depends`, on no row that `corpus` is measured on, what is set
    for that.
    """
    seconds = []
    if first is not None:
        before = Recipe.load(BEST["debian-depends"], [*ONE_WORKER, *first])
        other = read_corpus(before.corpus.path, before.corpus.fields)
        measured = pc.is_in(other.train.texts["uid"], corpus.test.texts["uid"].combine_chunks())
        kept = np.flatnonzero(~measured.to_numpy())
        folder, spent = trained_once(before, Corpus(other.train.take(kept), other.test, other.labels))
        seconds.append(spent)
        encoder = recipe.encoder.model_copy(update={"model": folder.path})
        recipe = recipe.model_copy(update={"encoder": encoder})
    folder, spent = trained_once(recipe, corpus)
    torch.set_num_threads(2)
    return TextEncoder.load(folder.path), [*seconds, spent]


def trained_once(recipe: Recipe, corpus: Corpus) -> tuple[Folder, float | None]:
    try:
        return trained_encoder(recipe, corpus), None
    except FileNotFoundError:
        started = time.perf_counter()
        with connected():
            folder = train(recipe, corpus)
        return folder, round(time.perf_counter() - started, 1)


def main(names: Sequence[str]) -> None:
    """names: the corpora and small steps to measure, all where there are none; the others stay as they were written."""
    if unknown := sorted(set(names) - {*BEST, *SMALL_STEPS}):
        raise SystemExit(f"{unknown} are none of {[*BEST, *SMALL_STEPS]}")
    figures = json.loads(RESULT.read_text())["figures"] if names else {"ladder, held-out rows": {}}
    figures["small runs"] = SMALL
    ladder = figures["ladder, held-out rows"]

    def write() -> list[dict[str, Any]]:  # it takes long: what is known is written as soon as it is
        targets = [
            at_least(f"{corpus}, {name}", figures[corpus]["both"][name], wanted)
            for corpus, of_corpus in WANTED.items()
            if corpus in figures
            for name, wanted in of_corpus.items()
        ]
        write_result("accuracy", figures, targets)
        return targets

    for corpus, path in BEST.items():
        if not names or corpus in names:
            after = corpus == AFTER_DEPENDS
            chosen = step(path, [], SMALL if after else None)
            figures[corpus] = {**best(path, chosen, [] if after else None), "commit": commit()}
            print(corpus, figures[corpus], flush=True)
            write()
    for name, overrides in SMALL_STEPS.items():
        if not names or name in names:
            row = step(RECIPE, overrides, FIRST.get(name))
            print(f"{name:<40}", *(f"{row[name]:7.2f}" for name in row if name != "train_s"), flush=True)
            ladder[name] = {**row, "commit": commit()}
            write()
    print_targets({}, write())


if __name__ == "__main__":
    main(sys.argv[1:])
