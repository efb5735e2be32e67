"""The objectives against each other on `debian-related`: same encoder, same texts seen, three seeds.

Each seed holds a tenth of the training rows out; on them each objective's λ and τ are chosen, so that none is measured
at another one's best. The memory has the other nine tenths; the test part is measured once, at what was chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from _result import at_least, print_targets, write_result
from _training import RECIPE, chosen_on, five, memory_of

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.evaluation import evaluate
from raexmc_ray.evaluation.sweep import FIGURES
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.trainer import train

OBJECTIVES = {
    "joint": "{}",
    "joint, voting instances": "{shared: voting}",
    "dual encoder": "{instances: none}",
    "InfoNCE": "{kind: softmax, instances: none}",
}
SEEDS = (0, 1, 2)
SMALL = ["encoder.layers=2", "training.epochs=2", "training.learning_rate=3.0e-4"]
ONE_WORKER = ["cluster.workers=1", "cluster.cpus_per_worker=2"]


def measure(objective: str, seed: int) -> dict[str, Any]:
    """{"lambda", "temperature", row: five figures on the test part} of one training."""
    overrides = [f"training.objective={objective}", f"training.seed={seed}", "cluster.storage=runs/objectives"]
    recipe = Recipe.load(RECIPE, [*SMALL, *ONE_WORKER, *overrides])
    whole = read_corpus(recipe.corpus.path, recipe.corpus.fields)
    held_out = whole.hold_out(0.1, seed)
    with connected():
        folder = train(recipe, held_out)
    torch.set_num_threads(2)
    encoder = TextEncoder.load(folder.path)
    lambda_, temperature, on_held_out = chosen_on(held_out, encoder, recipe)
    prediction = recipe.prediction.model_copy(update={"lambda_": lambda_, "temperature": temperature})
    corpus = Corpus(held_out.train, whole.test, whole.labels)
    table = evaluate(memory_of(corpus, encoder, recipe), corpus, recipe.corpus, prediction).table
    rows = {row: five(table[row]) for row in ("labels only", "instances only", "both")}
    return {"lambda": lambda_, "temperature": temperature, "held_out": on_held_out, **rows}


def main() -> None:
    runs = {name: [measure(text, seed) for seed in SEEDS] for name, text in OBJECTIVES.items()}
    summary = {}
    for name, measured in runs.items():
        for row in ("labels only", "instances only", "both"):
            values = np.array([[run[row][figure] for figure in FIGURES] for run in measured])
            mean, spread = values.mean(0).round(2).tolist(), values.std(0, ddof=1).round(2).tolist()
            summary[f"{name}: {row}"] = {"mean": dict(zip(FIGURES, mean, strict=True)), "spread": spread}
            print(f"{name + ': ' + row:<42}", *(f"{m:6.2f} ±{s:.2f}" for m, s in zip(mean, spread, strict=True)))
    targets = []
    for figure in FIGURES:
        ours = summary["joint: both"]["mean"][figure]
        others = (k for k in summary if not k.startswith("joint"))
        best = max(others, key=lambda k: summary[k]["mean"][figure])
        targets.append(at_least(f"joint, both, {figure}; next: {best}", ours, summary[best]["mean"][figure]))
    figures = {"settings": [RECIPE.name, *SMALL], "summary": summary, "runs": runs}
    write_result(Path(__file__).stem, figures, targets)
    print_targets({}, targets)


if __name__ == "__main__":
    main()
