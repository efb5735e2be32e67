"""λ, temperature and neighbours that do best on held-out training rows, from one retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from raexmc_ray.corpus import Corpus
from raexmc_ray.evaluation.held_out import HeldOut
from raexmc_ray.evaluation.retrieve import Retrieved, deepest_of, encode, retrieve
from raexmc_ray.evaluation.sweep import FIGURES, Figures, Sweep, choose, grid
from raexmc_ray.files import Folder
from raexmc_ray.local import Memory
from raexmc_ray.memory.defaults import with_defaults
from raexmc_ray.memory.snapshot import Snapshot
from raexmc_ray.metrics import inverse_propensity
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import CorpusSection, Neighbours, PredictionSection

LAMBDAS = tuple(i / 10 for i in range(11))
TEMPERATURES = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.11, 0.15, 0.2)
JOINT = (25, 50, 100, 200, 400)
APART = (25, 50, 100, 200)
"""As many instances as labels."""
TUNING = "tuning.json"
STEP_LAMBDA, STEP_TEMPERATURE = 0.05, 1.2
ROUNDS = 4


class Tuned(BaseModel):
    """What was chosen, on which rows, and what it gains on them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    rows: str
    """The rows that it was chosen on; the figures are of these same rows."""
    warning: str | None
    """Why the figures mislead, where they do."""
    chosen_by: list[str]
    """The metrics that were made best: the mean of them, each relative to its best."""
    tried: int
    """Settings that were tried."""
    before: PredictionSection
    after: PredictionSection
    figures_before: Figures
    figures_after: Figures
    """{metric: percent}."""
    snapshot_before: str
    snapshot_after: str | None = None
    """The snapshot that has what was chosen as its defaults; the one before, where that was best already."""


def tune(
    memory: Memory, corpus: Corpus, section: CorpusSection, held_out: HeldOut, metrics: Sequence[str] = FIGURES
) -> Tuned:
    """Sweep λ and temperature over a grid, and the neighbours; then more finely around the best, until it stays.

    corpus: its training part gives the propensities; its test part is not looked at.
    """
    before = memory.manifest.defaults
    queries_BD = encode(memory, held_out.split)
    candidates = _neighbours(before.neighbours, memory.manifest.instances, memory.manifest.labels)
    depth = max(map(deepest_of, candidates))
    found = list(retrieve(memory, queries_BD, depth, held_out.split.filtered, held_out.own_keys))
    inverse_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
    swept: dict[PredictionSection, Figures] = {}
    best, around = before, [before, *grid(before, LAMBDAS, TEMPERATURES)]
    for _ in range(ROUNDS):
        new = [one for one in [*around, *grid(best, neighbours=candidates)] if one not in swept]
        swept |= _sweep(found, new).figures(held_out.split.relevance, inverse_L)
        previous, best = best, choose(swept, metrics)
        around = _around(best)
        if best == previous and all(one in swept for one in around):
            break
    return Tuned(
        rows=held_out.said,
        warning=held_out.warning,
        chosen_by=list(metrics),
        tried=len(swept),
        before=before,
        after=best,
        figures_before=swept[before],
        figures_after=swept[best],
        snapshot_before=memory.manifest.id,
    )


def publish_tuned(memory: Folder, snapshot: Snapshot, corpus: Corpus, tuned: Tuned) -> Tuned:
    """Publish what was chosen as the defaults of a new snapshot, unless they were the best; names it in the result."""
    if tuned.after == tuned.before:
        return tuned
    return tuned.model_copy(update={"snapshot_after": with_defaults(memory, snapshot, corpus.fingerprint, tuned.after)})


def _sweep(found: Sequence[Retrieved], settings: Sequence[PredictionSection]) -> Sweep:
    swept = Sweep(settings)
    with Progress(f"tune, {len(swept.settings)} settings", sum(len(b.queries_BD) for b in found), "rows") as progress:
        for batch in found:
            swept.add(batch)
            progress.add(len(batch.queries_BD))
    return swept


def _around(best: PredictionSection) -> list[PredictionSection]:
    lambdas = [round(best.lambda_ + i * STEP_LAMBDA, 2) for i in (-1, 0, 1)]
    temperatures = [float(f"{best.temperature * STEP_TEMPERATURE**i:.2g}") for i in (-1, 0, 1)]
    return grid(best, [one for one in lambdas if 0 <= one <= 1], temperatures)


def _neighbours(own: Neighbours, instances: int, labels: int) -> list[Neighbours]:
    """What is tried: joint numbers, and as many of each kind; not more than there are keys."""
    tried = [own]
    tried += [Neighbours(joint=b) for b in JOINT if b <= instances + labels]
    tried += [Neighbours(instances=b, labels=b) for b in APART if b <= min(instances, labels)]
    return list(dict.fromkeys(tried))
