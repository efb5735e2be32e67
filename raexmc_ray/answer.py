"""Answers for people and for JSON: labels with their texts, scores and evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from raexmc_ray.predict import Evidence, Predictions


class KeyVote(BaseModel):
    """A key of the memory that voted for a label."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    key_id: int = Field(examples=[27048])
    kind: Literal["instance", "label"]
    """Whose key it is."""
    uid: str = Field(examples=["vim-common"])
    text: str = Field(examples=["vim-common: Vi IMproved - Common files"])
    similarity: float = Field(examples=[0.88])
    """Cosine of the text and the key, in [−1, 1]."""
    share: float = Field(examples=[0.25])
    """The part of the label's score that this key gave, in (0, 1]."""


class ScoredLabel(BaseModel):
    """A label that fits a text."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    label: int = Field(examples=[15251])
    """Index of the label in its corpus."""
    uid: str = Field(examples=["vim"])
    text: str = Field(examples=["vim: Vi IMproved - enhanced vi editor"])
    score: float = Field(examples=[0.126])
    """p̂ of the label, in (0, 1]."""
    evidence: list[KeyVote] | None = None
    """The keys that voted for it most, if asked for."""
    label_share: float | None = Field(None, examples=[0.55])
    """With evidence: the part of the score that the label's own key gave, in [0, 1]; instances gave the rest."""


def make_answers(
    predictions: Predictions,
    labels: pa.Table,
    evidence: Evidence | None = None,
    keys: Mapping[int, Mapping[str, str]] | None = None,
) -> list[list[ScoredLabel]]:
    """For each query its labels, the best first; no padding.

    labels: Arrow table (index, uid, text) of all labels. keys: what `join_keys` gives for the keys in
    `evidence`.
    """
    cells = predictions.labels_Bk.ravel()
    found = np.flatnonzero(cells >= 0)
    rows = labels.select(["uid", "text"]).take(cells[found]).to_pylist()
    answers: list[list[ScoredLabel]] = [[] for _ in range(len(predictions))]
    scores, k = predictions.scores_Bk.ravel(), predictions.labels_Bk.shape[1]
    for cell, row in zip(found, rows, strict=True):
        said: dict[str, Any] = {}
        if evidence is not None and keys is not None:
            said = {"evidence": _votes(int(cell), evidence, keys), "label_share": float(evidence.label_shares[cell])}
        answers[cell // k].append(ScoredLabel(label=int(cells[cell]), score=float(scores[cell]), **said, **row))
    return answers


def _votes(cell: int, evidence: Evidence, keys: Mapping[int, Mapping[str, Any]]) -> list[KeyVote]:
    return [
        KeyVote(
            key_id=int(evidence.key_ids[i]),
            similarity=float(evidence.similarities[i]),
            share=float(evidence.shares[i]),
            **keys[int(evidence.key_ids[i])],
        )
        for i in range(evidence.offsets[cell], evidence.offsets[cell + 1])
    ]
