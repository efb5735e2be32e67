"""Training rows that settings may be chosen on: never the test part, and if possible none that the encoder knows.

A training row is in the memory itself: its own key is masked. That is enough for an encoder that was not
trained on the row. One that was has drawn the row to its labels: their keys seem better evidence than they are for a
new text, and a λ chosen on such rows is wrong. So the rows are, the first of these that there are:

1. `corpus.holdout`: the rows that stand in for the test part, which neither memory nor encoder has seen;
2. the rows that the training kept aside to evaluate on (`training.evaluation`): in the memory, not in the training;
3. any rows, where the encoder was not trained on this corpus: leaving one out is then all that is needed;
4. any rows, with a warning.

A label that no other training row has is neither right nor wrong for its row (`Split.without_unseen`). Rows whose text
another row has, too, stay: a test part that was drawn from the same texts has as many of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from raexmc_ray.corpus import Corpus, Split
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.evaluation.measure import refuse_foreign
from raexmc_ray.files import Folder
from raexmc_ray.local import Memory
from raexmc_ray.recipe import Recipe

ROWS = 5000
"""Rows that are looked at, drawn from those there are."""
UNKNOWN = "it is not known whether the encoder was trained on these rows"
TRAINED = "trained.json"
"""What a training leaves beside its encoder."""


@dataclass(frozen=True)
class HeldOut:
    """Rows to choose settings on.

    split: their texts, labels and filter pairs. own_keys: int64, their own keys, where they are in the memory.
    said: which rows they are, for people. warning: why figures on them mislead; nothing where they do not.
    """

    split: Split
    own_keys: np.ndarray | None
    said: str
    warning: str | None = None


def held_out_rows(recipe: Recipe, corpus: Corpus, memory: Memory, rows: int = ROWS) -> HeldOut:
    """The rows to choose settings of a memory on. corpus: as the recipe reads it. Raises ValueError where the memory is
    of another corpus."""
    refuse_foreign(memory.manifest, corpus)
    tower = memory.encoder.with_lexical(None).fingerprint  # a lexical part is no part of a training
    trained_by, trained_on = training_of(Folder.at(recipe.cluster.storage), tower) or (None, None)
    on_these = trained_on == corpus.fingerprint  # the rows that a training keeps aside follow from all of them
    if recipe.corpus.holdout:
        held_out = HeldOut(corpus.test, None, f"corpus.holdout: {recipe.corpus.holdout:.0%} of the training rows")
        if trained_by and not on_these:
            other = "the encoder was trained on other rows (another corpus.holdout, or corpus), and may know these"
            held_out = _warned(held_out, other)
        elif not trained_by and not _is_untrained(recipe, tower):
            held_out = _warned(held_out, UNKNOWN)
        return _sampled(held_out, rows)
    if trained_by and on_these and trained_by.training.evaluation.every:
        share, seed = trained_by.training.evaluation.holdout, trained_by.training.seed + 1
        places = corpus.held_out_places(share, seed)
        said = f"training.evaluation.holdout: {share:.0%} of the training rows, which the encoder was not trained on"
        return _sampled(HeldOut(corpus.hold_out(share, seed).test, places, f"{said}, less their own keys"), rows)
    counts_L = np.bincount(corpus.train.relevance.indices, minlength=len(corpus.labels))
    everyone = corpus.train.without_unseen(counts_L > 1)
    held_out = HeldOut(everyone, np.arange(len(everyone)), "training rows, each less its own key")
    if trained_by:
        held_out = _warned(
            held_out,
            "the encoder was trained on these rows, or most, and finds their labels too easily: what is chosen is "
            "biased. Hold rows out of the training (training.evaluation.every=1) or of everything (corpus.holdout=0.1)",
        )
    elif not _is_untrained(recipe, tower):
        held_out = _warned(held_out, UNKNOWN)
    return _sampled(held_out, rows)


def training_of(storage: Folder, fingerprint: str) -> tuple[Recipe, str] | None:
    """(recipe, fingerprint of the corpus) of the training under `storage` that made the encoder of this fingerprint, if
    one did."""
    for name in (storage / "encoders").names():
        file = storage / "encoders" / name / TRAINED
        if file.size() is not None:
            details = json.loads(file.read())
            if details["fingerprint"] == fingerprint:
                return Recipe.parse(details["recipe"], source=str(file)), details["corpus"]
    return None


def _is_untrained(recipe: Recipe, fingerprint: str) -> bool:
    """Whether the encoder is the one that the recipe's training would begin with."""
    section = recipe.encoder
    try:
        encoder = TextEncoder.load(section.model, layers=section.layers, max_tokens=section.max_tokens)
    except ValueError:  # it is not here, and the memory has its own
        return False
    return encoder.with_lexical(None).fingerprint == fingerprint


def _warned(held_out: HeldOut, warning: str) -> HeldOut:
    return HeldOut(held_out.split, held_out.own_keys, held_out.said, warning)


def _sampled(held_out: HeldOut, rows: int) -> HeldOut:
    """At most `rows` of those that have a label, drawn by a fixed seed. Raises ValueError where there are none."""
    labelled = np.flatnonzero(held_out.split.labels_per_row)
    if not len(labelled):
        raise ValueError(
            f"there is no row to choose settings on ({held_out.said}): none has a label that others have. Hold more "
            "rows out (training.evaluation.holdout, corpus.holdout), and train or build again"
        )
    drawn = np.sort(np.random.default_rng(0).permutation(labelled)[:rows])
    own = None if held_out.own_keys is None else held_out.own_keys[drawn]
    said = f"{len(drawn):,} rows of {held_out.said}"
    return HeldOut(held_out.split.take(drawn), own, said, held_out.warning)
