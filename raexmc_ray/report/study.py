"""Learns, from the retrieval of an evaluation, what the report shows: no key is searched for twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from raexmc_ray.answer import make_answers
from raexmc_ray.corpus import Corpus
from raexmc_ray.evaluation.measure import BOTH, DEPTH
from raexmc_ray.evaluation.retrieve import BATCH, CUTTING_KINDS, Retrieved, width_of
from raexmc_ray.evaluation.sweep import Sweep, grid
from raexmc_ray.local import Memory
from raexmc_ray.memory.hits import Hits
from raexmc_ray.metrics import inverse_propensity, look_up
from raexmc_ray.predict import Predictions, vote_evidence
from raexmc_ray.recipe import MOST_NEIGHBOURS, CorpusSection, Neighbours, PredictionSection
from raexmc_ray.report import calibration
from raexmc_ray.report.findings import Calibration, Findings, Mistake, Point
from raexmc_ray.report.sources import SourceCounts

ROWS = 20_000
"""Rows that curves and sources are of: beyond it, every second, third … batch."""
LAMBDAS = tuple(round(0.05 * i, 2) for i in range(21))
TEMPERATURES = (0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.11, 0.15, 0.2, 0.3)
NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
MISTAKES, EVIDENCE = 20, 4


@dataclass(frozen=True)
class _Wrong:
    """A row whose first label is wrong, with its hits."""

    score: float
    row: int
    hits: Hits
    first: Predictions


class Study:
    """Watches an evaluation (`evaluation.evaluate`), and says afterwards what it has seen."""

    def __init__(self, memory: Memory, corpus: Corpus, section: CorpusSection, settings: PredictionSection) -> None:
        self._memory, self._corpus, self._section, self._settings = memory, corpus, section, settings
        b = width_of(settings.neighbours)
        self.depth = min(MOST_NEIGHBOURS, max(2 * b, DEPTH))
        """Twice as deep as the settings ask for: to see whether more neighbours would help."""
        most = min(self.depth, memory.manifest.keys)
        numbers = sorted({n for n in NUMBERS if n < most} | {min(b, most), most})
        self._lambdas = grid(settings, sorted({*LAMBDAS, settings.lambda_}))
        self._temperatures = grid(settings, temperatures=sorted({*TEMPERATURES, settings.temperature}))
        self._neighbours = grid(settings, neighbours=[Neighbours(joint=n) for n in numbers])
        self._sweep = Sweep([*self._lambdas, *self._temperatures, *self._neighbours])
        self._sources = SourceCounts(b)
        self._every = max(1, math.ceil(len(corpus.test) / ROWS))
        self._rows: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._right: list[np.ndarray] = []
        self._wrong: list[_Wrong] = []

    def see(self, batch: Retrieved, predicted: Mapping[str, Predictions]) -> None:
        """Rows of the test part, in its order."""
        both, relevance = predicted[BOTH], self._corpus.test.relevance[batch.part]
        labelled = np.diff(relevance.indptr) > 0
        first = Predictions(both.labels_Bk[:, : calibration.DEPTH], both.scores_Bk[:, : calibration.DEPTH])
        right_Bk = look_up(first.labels_Bk, relevance)
        self._scores.append(first.scores_Bk[labelled])
        self._right.append(right_Bk[labelled])
        hits = batch.hits(self._settings.neighbours)
        wrong = np.flatnonzero(labelled & (first.labels_Bk[:, 0] >= 0) & ~right_Bk[:, 0])
        self._keep_wrong(batch.part.start, hits, first, wrong)
        if batch.part.start // BATCH % self._every == 0:
            self._rows.append(np.arange(batch.part.start, batch.part.stop))
            self._sweep.add(batch)
            self._sources.add(hits, both, relevance, batch.exclude, self._settings)

    def _keep_wrong(self, start: int, hits: Hits, first: Predictions, wrong: np.ndarray) -> None:
        best = wrong[np.argsort(-first.scores_Bk[wrong, 0], kind="stable")[:MISTAKES]]
        for row in best.tolist():
            alone = Predictions(first.labels_Bk[row : row + 1, :1], first.scores_Bk[row : row + 1, :1])
            self._wrong.append(_Wrong(float(alone.scores_Bk[0, 0]), start + row, hits.rows(row, row + 1), alone))
        self._wrong = sorted(self._wrong, key=lambda one: (-one.score, one.row))[:MISTAKES]
        # What is kept must not keep its whole batch alive.
        self._wrong = [replace(one, hits=_copied(one.hits)) for one in self._wrong]

    def findings(self) -> Findings:
        """What was seen. Asks the memory for the texts of the mistakes' evidence."""
        corpus, section = self._corpus, self._section
        inverse_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
        rows = np.concatenate(self._rows)
        figures = self._sweep.figures(corpus.test.relevance[rows], inverse_L)
        curves = (
            [Point(settings=one, figures=figures[one]) for one in settings]
            for settings in (self._lambdas, self._temperatures, self._neighbours)
        )
        lambdas, temperatures, neighbours = curves
        counts_B = corpus.test.labels_per_row
        calibrated = calibration.calibrate(
            np.concatenate(self._scores), np.concatenate(self._right), counts_B[counts_B > 0]
        )
        return Findings(
            rows=int((counts_B[rows] > 0).sum()),
            settings=self._settings,
            depth=self.depth,
            cuts=self._memory.manifest.index.kind in CUTTING_KINDS,
            lambdas=lambdas,
            temperatures=temperatures,
            neighbours=neighbours,
            sources=self._sources.sources(),
            calibration=calibrated,
            mistakes=[self._mistake(one, calibrated) for one in self._wrong],
        )

    def _mistake(self, wrong: _Wrong, calibrated: Calibration | None) -> Mistake:
        settings, test, labels = self._settings, self._corpus.test, self._corpus.labels
        lambda_, temperature = settings.lambda_, settings.temperature
        votes = vote_evidence(wrong.hits, wrong.first, lambda_=lambda_, temperature=temperature, keys=EVIDENCE)
        ((label,),) = make_answers(wrong.first, self._memory.labels, votes, self._memory.shards.keys(votes.key_ids))
        probability = None
        if calibrated:
            score = np.array([wrong.score])
            probability = float(calibration.probability(score, calibrated.temperature, calibrated.shift)[0])
        return Mistake(
            row=wrong.row,
            uid=test.texts["uid"][wrong.row].as_py(),
            text=test.texts["text"][wrong.row].as_py(),
            label_uid=label.uid,
            label_text=label.text,
            score=wrong.score,
            probability=probability,
            right_labels=labels["text"].take(test.relevance[wrong.row].indices).to_pylist(),
            evidence=label.evidence or [],
        )


def _copied(hits: Hits) -> Hits:
    return replace(
        hits,
        key_ids_Bb=hits.key_ids_Bb.copy(),
        scores_Bb=hits.scores_Bb.copy(),
        is_label_Bb=hits.is_label_Bb.copy(),
        votes=hits.votes.copy(),
        vote_offsets=hits.vote_offsets.copy(),
    )
