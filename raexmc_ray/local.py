"""A memory to ask: `raexmc_ray.open(path).predict(texts)`, in one process and without a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from raexmc_ray.answer import ScoredLabel, make_answers
from raexmc_ray.memory.hits import Hits
from raexmc_ray.memory.shard import LocalShards, Shards
from raexmc_ray.memory.snapshot import LABELS, Manifest, Snapshot, open_snapshot
from raexmc_ray.predict import aggregate, vote_evidence
from raexmc_ray.recipe import Neighbours, PredictionSection, explain

if TYPE_CHECKING:
    from raexmc_ray.encoder import TextEncoder


class Memory:
    """One snapshot of a knowledge memory, with the encoder that made it."""

    def __init__(self, snapshot: Snapshot, shards: Shards, encoder: TextEncoder | None = None) -> None:
        """encoder: the snapshot's, where it is loaded already."""
        self.snapshot = snapshot
        self.shards = shards
        self._loaded = encoder

    @property
    def manifest(self) -> Manifest:
        return self.snapshot.manifest

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder that made the keys, loaded when it is first needed; it only encodes."""
        encoder = self._loaded or self.snapshot.encoder()
        encoder.freeze_weights()
        return encoder

    @cached_property
    def labels(self) -> pa.Table:
        """All labels: index int64, uid, text."""
        return pq.read_table(self.snapshot.file(LABELS))

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        """The best keys for each query: float32 [B, d], of unit length."""
        return self.shards.search(queries_BD, neighbours)

    def settings(
        self,
        k: int | None = None,
        lambda_: float | None = None,
        temperature: float | None = None,
        neighbours: Neighbours | int | None = None,
    ) -> PredictionSection:
        """The snapshot's defaults, with what is given here in their place. Raises ValueError."""
        return override(self.manifest.defaults, k, lambda_, temperature, neighbours)

    def predict(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        lambda_: float | None = None,
        temperature: float | None = None,
        neighbours: Neighbours | int | None = None,
        evidence: int = 0,
    ) -> list[list[ScoredLabel]]:
        """The best k labels of each text, in the order (score descending, label ascending).

        lambda_, temperature, neighbours: as in a recipe; the snapshot's defaults where left out. An integer for
        `neighbours` is the joint number. evidence: how many keys are named for each label.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of texts: write predict([text])")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{place}] is no string, but {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"texts[{place}] is empty: there is nothing to label")
            try:
                text.encode()
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
                raise ValueError(f"texts[{place}] is not UTF-8: it has half a surrogate pair: remove it") from None
        settings = self.settings(k, lambda_, temperature, neighbours)
        hits = self.search(self.encoder.encode(texts), settings.neighbours)
        lambda_, temperature = settings.lambda_, settings.temperature
        predictions = aggregate(hits, lambda_=lambda_, temperature=temperature, k=settings.k)
        if not evidence:
            return make_answers(predictions, self.labels)
        votes = vote_evidence(hits, predictions, lambda_=lambda_, temperature=temperature, keys=evidence)
        return make_answers(predictions, self.labels, votes, self.shards.keys(votes.key_ids))


def open_memory(path: str | Path, snapshot: str | None = None, *, verify: bool = True) -> Memory:
    """Open the current snapshot of the memory at a path or URL, or the one named.

    verify: read every byte against its checksum first; without it only sizes are checked.
    Raises FileNotFoundError where there is no memory, SnapshotError where it cannot be trusted.
    """
    opened = open_snapshot(path, snapshot)
    return Memory(opened, LocalShards(opened, verify=verify))


def override(
    defaults: PredictionSection,
    k: int | None = None,
    lambda_: float | None = None,
    temperature: float | None = None,
    neighbours: Neighbours | int | None = None,
) -> PredictionSection:
    """`defaults` with what is given in their place. Raises ValueError that names what is out of its range."""
    asked = {"joint": neighbours} if isinstance(neighbours, int) else neighbours
    given = {"k": k, "lambda": lambda_, "temperature": temperature, "neighbours": asked}
    fields = defaults.model_dump(by_alias=True) | {name: value for name, value in given.items() if value is not None}
    try:
        return PredictionSection.model_validate(fields)
    except ValidationError as error:
        raise ValueError("; ".join(explain(PredictionSection, error))) from None
