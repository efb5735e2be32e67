"""What a study of an evaluation finds: the data behind the report, in the shape in which it is written."""

from __future__ import annotations

from raexmc_ray.answer import KeyVote
from raexmc_ray.evaluation.result import Result
from raexmc_ray.recipe import PredictionSection


class Point(Result):
    """A point of a curve."""

    settings: PredictionSection
    figures: dict[str, float]
    """{metric: percent}."""


class KindOfKeys(Result):
    """What the retrieved keys of instances, or of labels, are worth. Shares are in [0, 1]."""

    keys: float
    """Their share of the retrieved keys."""
    mass: float
    """Their share of the softmax mass, before λ."""
    right: float | None
    """The share of them that vote for a right label; nothing where none was retrieved."""
    share_by_rank: list[float]
    """Their share of the keys at rank 1, 2 …"""
    right_by_rank: list[float | None]
    """The share of those at rank 1, 2 … that vote for a right label; nothing where there are too few to say."""


class Reach(Result):
    """Which keys, of those retrieved, know a label that is right: shares of all pairs of a row and a label of it."""

    instances_only: float
    both: float
    labels_only: float
    neither: float


class Sources(Result):
    """Where the retrieved keys come from, and what each kind is worth."""

    instances: KindOfKeys
    labels: KindOfKeys
    reach: Reach
    label_share_right: float | None
    """Mean part of the score that the label's own key gave, of right labels among the first five."""
    label_share_wrong: float | None
    """The same of wrong labels."""


class Bin(Result):
    """Predictions with like probabilities."""

    predictions: int
    probability: float
    """Their mean."""
    right: float
    """The share of them that is right."""


class Reliability(Result):
    """How far probabilities can be believed, on rows that nothing was fitted on."""

    bins: list[Bin]
    """With an equal number of predictions each, the least probable first."""
    error: float
    """Expected calibration error: the mean distance of probability and share of right ones, over the bins."""
    log_loss: float
    brier: float
    """Mean squared distance of probability and outcome."""


class Threshold(Result):
    """What is labelled when only labels at least as probable are given."""

    probability: float
    score: float
    """p̂ that corresponds to it."""
    precision: float | None
    """Share of the labels given that are right; nothing where none is given."""
    recall: float
    """Share of the rows' labels that are given."""
    rows: float
    """Share of the rows that get a label."""


class Calibration(Result):
    """Scores as probabilities that a label is right: σ((logit p̂ + shift) / temperature)."""

    temperature: float
    shift: float
    depth: int
    """Of each row the first so many labels are looked at."""
    fitted_rows: int
    measured_rows: int
    """Fitted on the one half of the rows, measured on the other."""
    scores: Reliability
    """Of p̂ itself, taken for a probability."""
    probabilities: Reliability
    thresholds: list[Threshold]


class Mistake(Result):
    """A wrong label with a high score."""

    row: int
    uid: str
    text: str
    label_uid: str
    label_text: str
    score: float
    probability: float | None
    right_labels: list[str]
    """Texts of the row's labels."""
    evidence: list[KeyVote]


class Findings(Result):
    """All of it."""

    rows: int
    """Rows that curves and sources are of: all, or of very many an even sample."""
    settings: PredictionSection
    depth: int
    """Keys of each kind that were retrieved: what the curves are cut from."""
    cuts: bool
    """Whether all curves are cuts of that retrieval; else λ's and the temperature's alone are of one."""
    lambdas: list[Point]
    temperatures: list[Point]
    neighbours: list[Point]
    sources: Sources
    calibration: Calibration | None
    """Nothing where too few rows have a label."""
    mistakes: list[Mistake]
