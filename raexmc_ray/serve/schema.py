"""What goes over HTTP, and how an application is set up."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from raexmc_ray.answer import ScoredLabel
from raexmc_ray.recipe import Neighbours

MAX_TEXTS = 256
MAX_CHARACTERS = 20_000


class ServeSettings(BaseModel):
    """Arguments of the application, under `args` in a Serve config; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    memory: str
    """Folder or URL of the memory; a relative path counts from where `serve run` is called."""
    snapshot: str | None = None
    """Which snapshot; the current one where it is left out."""
    encoder_replicas: int = Field(1, ge=1)
    """Text encoders."""
    encoder_cpus: float = Field(1.0, gt=0)
    """CPUs of an encoder: also its number of threads."""
    encoder_gpus: float = Field(0.0, ge=0)
    """GPUs of an encoder."""
    shard_replicas: int = Field(1, ge=1)
    """Replicas of each shard."""
    shard_cpus: float = Field(0.1, gt=0)
    """CPUs that each shard replica reserves."""
    timeout_s: float = Field(30.0, gt=0)
    """A request that takes longer is answered with an error."""


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_CHARACTERS)]


class PredictRequest(BaseModel):
    """Which labels fit these texts?"""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, populate_by_name=True)
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, examples=[["vim: Vi IMproved"]])]
    """The texts to label."""
    k: int | None = Field(None, ge=1, le=1000, examples=[10])
    """Labels for each text."""
    lambda_: float | None = Field(None, ge=0, le=1, alias="lambda", examples=[0.5])
    """1 trusts the training instances only, 0 the labels only."""
    temperature: float | None = Field(None, gt=0, examples=[0.08])
    """Temperature of the softmax over the retrieved keys."""
    neighbours: Neighbours | None = Field(None, examples=[{"joint": 200}])
    """How many keys are retrieved."""
    evidence: int = Field(0, ge=0, le=100, examples=[3])
    """How many keys are named for each label as its evidence."""


class TextAnswer(BaseModel):
    """The labels of one text, in the order (score descending, label ascending)."""

    labels: list[ScoredLabel]


class PredictReply(BaseModel):
    """The answers, in the order of the texts."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    snapshot: str
    """The snapshot of the memory that every part of this answer comes from."""
    answers: list[TextAnswer]
    milliseconds: dict[str, float]
    """Time spent in each stage: encode, search, aggregate, total."""


class MemoryReply(BaseModel):
    """What the application answers from."""

    snapshot: str
    created: str
    instances: int
    labels: int
    shards: int
    dimension: int
    index: str
    encoder_fingerprint: str
    defaults: dict[str, object]


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
