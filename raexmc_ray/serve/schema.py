"""What goes over HTTP, and how an application is set up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    StringConstraints,
    Tag,
    model_validator,
)

from raexmc_ray.answer import ScoredLabel
from raexmc_ray.recipe import Precision

MAX_TEXTS, MAX_CHARACTERS, MAX_K, MAX_NEIGHBOURS, MAX_FILTER = 256, 20_000, 1000, 16384, 10_000


class Limits(BaseModel):
    """What one request may ask for, and how many may come; each may be lowered, most may not be raised. A snapshot's
    defaults that are beyond `k` or `neighbours` are cut to these."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    body_bytes: int = Field(8 << 20, ge=1024)
    """Bytes of a request's body (413 beyond)."""
    texts: int = Field(MAX_TEXTS, ge=1, le=MAX_TEXTS)
    """Texts of a request."""
    characters: int = Field(MAX_CHARACTERS, ge=1, le=MAX_CHARACTERS)
    """Characters of a text."""
    k: int = Field(MAX_K, ge=1, le=MAX_K)
    """Labels for a text."""
    neighbours: int = Field(2000, ge=1, le=MAX_NEIGHBOURS)
    """Keys retrieved for a text, of all or of each kind."""
    entries: int = Field(100_000, ge=1)
    """Labels and the keys named for them in a reply: texts × k × (1 + evidence). A kilobyte each, at the least."""
    reply_characters: int = Field(1000, ge=1)
    """Characters of the text of a label or key in a reply; of a longer one the last of them is "…". That of a label is
    whole in `/v1/labels/UID`."""
    concurrent_requests: int = Field(128, ge=1)
    """Requests that an ingress replica works on at a time; without `serve/gate.py` in the proxies as many more wait,
    and the next one is told to come again (503, with Retry-After). The gate refuses sooner and cheaper: each proxy for
    itself, so that what all proxies let in should be no more than what all ingresses take."""
    requests_per_second: int | None = Field(None, ge=1, examples=[100])
    """Requests of one token (of everyone, where there are no tokens) that an ingress replica takes (429 beyond)."""


class ServeSettings(BaseModel):
    """Arguments of the application, under `args` in a Serve config; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    memory: str
    """Folder or URL of the memory; a relative path counts from where `serve run` is called."""
    snapshot: str | None = None
    """Which snapshot to begin with; the current one where it is left out. `raexmc rollout` moves on from there."""
    ingress_replicas: int = Field(1, ge=1)
    """HTTP ingresses. Each batches the requests that it gets."""
    encoder_replicas: int = Field(1, ge=1)
    """Text encoders."""
    encoder_replicas_at_most: int | None = Field(None, ge=1)
    """Encoders under load: Serve adds and removes them; where it is left out there are always `encoder_replicas`."""
    encoder_cpus: float = Field(1.0, gt=0)
    """CPUs of an encoder: also its number of threads."""
    encoder_gpus: float = Field(0.0, ge=0)
    """GPUs of an encoder."""
    encoder_precision: Precision = "auto"
    """`auto`: bfloat16 on a GPU that has it, float32 on a CPU. bfloat16 on a CPU that has it encodes sooner;
    a score then may differ by 5e-3 with what else is encoded in its batch, where it is 1e-5 in float32."""
    shard_replicas: int = Field(1, ge=1)
    """Replicas of each shard; with two, nobody notices that one is lost, and one that hangs costs a third of
    `shard_timeout_s`: then the other is asked, too."""
    shard_cpus: float = Field(0.1, gt=0)
    """CPUs that each shard replica reserves; it searches with as many threads, one at least."""
    shard_gpus: float = Field(0.0, ge=0)
    """GPUs of a shard replica: for the kinds of index flat, flat-fp16 and ivf-fp16."""
    batch_texts: int = Field(32, ge=1, le=1024)
    """Texts of waiting requests that are answered together, at most; a request of more is a batch of its own. More are
    good for a GPU; on CPUs they only make answers come in gusts."""
    timeout_s: float = Field(15.0, gt=0)
    """A request that takes longer is answered with an error (503; 408 where it is its body that takes so long)."""
    shard_timeout_s: float = Field(5.0, gt=0)
    """A shard that takes longer is missing: the request fails, or says so where it allows a partial answer."""
    tokens_file: str | None = None
    """File with bearer tokens, one a line, of which a request must carry one; it is read again when it changes, so
    that tokens can be rotated. Tokens in the environment variable RAEXMC_TOKENS, parted by commas, count, too."""
    anonymous_access: bool = False
    """Answer anyone who reaches the port, though it is not on loopback and no token guards it."""
    log_texts: bool = False
    """Write the texts of requests into the access log."""
    limits: Limits = Limits()


def _integral(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral), Strict()]
"""As JSON Schema has it: 10 and 10.0, but not "10" or true."""
INK = "[^\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]"
"""A character that is not blank, spelled out: dialects of regular expressions differ in what `\\S` is."""


def _not_blank(text: str) -> str:
    if not re.search(INK, text):
        raise ValueError("the text is blank")
    return text


Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_CHARACTERS),
    AfterValidator(_not_blank),
    Field(json_schema_extra={"pattern": INK}),
]
Uid = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class _Asked(BaseModel):
    """What a caller sends: fields that it does not have are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, given: object) -> object:
        # Pydantic makes an error of each: for a body of nothing else that took seconds, in which nobody was answered.
        if isinstance(given, dict) and len(given) > 2 * len(cls.model_fields):
            names = (field.alias or name for name, field in cls.model_fields.items())
            raise ValueError(f"{len(given):,} fields are more than there are: {', '.join(names)}")
        return given


class Joint(_Asked):
    """The best keys of the whole memory."""

    joint: Integer = Field(ge=1, le=MAX_NEIGHBOURS, examples=[200])
    """Keys from the joint memory."""


class Apart(_Asked):
    """The best keys of the instances and the best keys of the labels; at least one of the numbers is above zero."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {name: {"minimum": 1}}, "required": [name]}  # what the validator below holds it to
                for name in ("instances", "labels")
            ]
        },
    )
    instances: Integer = Field(0, ge=0, le=MAX_NEIGHBOURS, examples=[100])
    """Keys among the training instances."""
    labels: Integer = Field(0, ge=0, le=MAX_NEIGHBOURS, examples=[100])
    """Keys among the labels."""

    @model_validator(mode="after")
    def _not_none(self) -> Self:
        if not self.instances + self.labels:
            raise ValueError("at least one of `instances` and `labels` must be above zero")
        return self


def _mode(given: object) -> str:
    """Which of the two was meant, so that an error is said of that one, and not of both."""
    return "joint" if isinstance(given, Joint) or (isinstance(given, dict) and "joint" in given) else "apart"


JointOrApart = Annotated[Annotated[Joint, Tag("joint")] | Annotated[Apart, Tag("apart")], Discriminator(_mode)]


class PredictRequest(_Asked):
    """Which labels fit these texts? What is left out is as the snapshot's defaults have it."""

    model_config = ConfigDict(allow_inf_nan=False, validate_by_name=True, validate_by_alias=True)
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, examples=[["vim: Vi IMproved"]])]
    """The texts to label."""
    k: Annotated[int, Field(ge=1, le=MAX_K), Strict(), BeforeValidator(_integral)] | None = Field(None, examples=[10])
    """Labels for each text."""
    lambda_: float | None = Field(None, ge=0, le=1, alias="lambda", examples=[0.5], strict=True)
    """1 trusts the training instances only, 0 the labels only."""
    temperature: float | None = Field(None, ge=1e-4, le=100, examples=[0.08], strict=True)
    """Of the softmax over the retrieved keys."""
    neighbours: JointOrApart | None = Field(None, examples=[{"joint": 200}])
    """How many keys are retrieved: of all, or of instances and labels apart."""
    evidence: Integer = Field(0, ge=0, le=100, examples=[3])
    """How many keys are named for each label as its evidence. Texts × k × (1 + evidence) is limited, too: see
    `limits.entries` of the memory's reply."""
    labels_allowed: Annotated[list[Uid], Field(max_length=MAX_FILTER)] | None = Field(None, examples=[["vim", "nano"]])
    """Uids of labels: no others are answered. Of what was retrieved; scores stay what they are."""
    labels_blocked: Annotated[list[Uid], Field(max_length=MAX_FILTER)] | None = Field(None, examples=[["emacs"]])
    """Uids of labels that are not answered."""
    allow_partial: bool = Field(False, strict=True)
    """Answer without a shard that is missing, and name it, rather than not at all."""


class TextAnswer(BaseModel):
    """The labels of one text, in the order (score descending, label ascending)."""

    labels: list[ScoredLabel]


class PredictReply(BaseModel):
    """The answers, in the order of the texts."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    snapshot: str = Field(examples=["6aa265fcd29ffec7"])
    """The snapshot of the memory that every part of this answer comes from."""
    answers: list[TextAnswer]
    missing_shards: list[int] = Field(examples=[[]])
    """Shards whose keys these answers do not know: empty unless `allow_partial` was set."""
    milliseconds: dict[str, float] = Field(
        examples=[{"queue": 2.7, "encode": 11.0, "search": 21.2, "merge": 0.9, "aggregate": 1.1, "total": 38.0}]
    )
    """Time in each stage: queue, encode, search (the slowest shard), merge, aggregate, total."""


class LabelReply(BaseModel):
    """A label of the memory."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    label: int = Field(examples=[15251])
    """Index of the label in its corpus."""
    uid: str = Field(examples=["vim"])
    text: str = Field(examples=["vim: Vi IMproved - enhanced vi editor"])


class LabelsReply(BaseModel):
    """Labels whose text or uid begins with what was asked for."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    snapshot: str = Field(examples=["6aa265fcd29ffec7"])
    labels: list[LabelReply]


class MemoryReply(BaseModel):
    """What the application answers from."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    snapshot: str = Field(examples=["6aa265fcd29ffec7"])
    created: str = Field(examples=["2026-11-24T21:14:58+00:00"])
    """UTC, ISO 8601."""
    instances: int = Field(examples=[11797])
    labels: int = Field(examples=[15785])
    shards: int = Field(examples=[4])
    dimension: int = Field(examples=[384])
    """Numbers in a key."""
    index: str = Field(examples=["flat"])
    """Kind of index."""
    encoder_fingerprint: str = Field(examples=["0f3c…"])
    """SHA-256 of the encoder's weights and settings."""
    bytes: dict[str, int] = Field(examples=[{"index": 42366084, "encoder": 76000000}])
    """Of the snapshot, by part."""
    defaults: dict[str, object] = Field(
        examples=[{"lambda": 0.5, "temperature": 0.08, "neighbours": {"joint": 200}, "k": 10}]
    )
    """λ, temperature, neighbours and k where a request leaves them out: the snapshot's, within the limits."""
    limits: Limits
    """What a request may ask for."""


class Status(BaseModel):
    """Whether the application is there."""

    status: str = Field(examples=["ok"])


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    type: str = "about:blank"
    title: str = Field(examples=["The request is not valid"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["k: Input should be less than or equal to 1000"])
    """What was wrong, where, and what to do."""
    request_id: str = Field("", examples=["6b1f8a4e"])
    """Also in the header X-Request-ID, and in the logs."""
    missing_shards: list[int] | None = Field(None, examples=[[2]])
    """Shards that did not answer."""


def say_errors(errors: Sequence[Any], within: int = 0) -> str:
    """The first ten of pydantic's errors, for people: where, and what. within: names that each place begins with and
    nobody wrote."""
    return "; ".join(_said(part, within) for part in errors[:10])


def _said(part: dict[str, Any], within: int) -> str:
    if part["type"] == "json_invalid":
        return f"body: not JSON at character {part['loc'][-1]}: {part['ctx']['error']}"
    return f"{'.'.join(map(str, part['loc'][within:])) or 'body'}: {part['msg']}"
