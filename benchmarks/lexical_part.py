"""What the lexical part of the keys adds: the demo's memory with it and without, from the same trained encoder.

Settings are the demo's in both; they were not chosen on the test part. Differences with their 95% intervals, by paired
bootstrap over the test rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _result import at_least, print_targets, write_result

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import read_corpus
from raexmc_ray.evaluation import evaluate
from raexmc_ray.evaluation.compare import compare
from raexmc_ray.evaluation.sweep import FIGURES
from raexmc_ray.local import open_memory
from raexmc_ray.memory.build import build
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.trainer import train

RECIPE = Path(__file__).parent.parent / "jobs/recipes/demo.yaml"
WEIGHTS = (0.0, 0.3)


def main() -> None:
    measured = []
    for weight in WEIGHTS:
        recipe = Recipe.load(RECIPE, [f"memory.lexical.weight={weight}"])
        corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields)
        with connected():
            build(recipe, corpus, train(recipe, corpus))  # the second time the encoder is there
        memory = open_memory(f"{recipe.cluster.storage}/memory")
        measured.append(evaluate(memory, corpus, recipe.corpus, recipe.prediction, recipe=recipe))
    figures: dict[str, Any] = {}
    for row in ("labels only", "instances only", "both"):
        found = {one.metric: one for one in compare(measured[0], measured[1], row) if one.metric in FIGURES}
        figures[row] = {
            name: {
                "without": round(one.a, 2),
                "with": round(one.b, 2),
                "difference": round(one.difference, 2),
                "95%": [round(one.low, 2), round(one.high, 2)],
            }
            for name, one in found.items()
        }
    both = figures["both"]
    targets = [at_least(f"both, {name}: with it, beside without", f["with"], f["without"]) for name, f in both.items()]
    write_result("lexical_part", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    main()
