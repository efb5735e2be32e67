"""The report's figures: one panel each, so that they can be read on a phone; drawn for light and for dark pages.

Instances, labels and both have the same colour and mark everywhere; the colours differ in lightness and hue so that
they are told apart by people who do not see red or green, and on paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from raexmc_ray.evaluation.measure import BOTH, INSTANCES_ONLY, LABELS_ONLY
from raexmc_ray.evaluation.result import Evaluation, LabelGroup
from raexmc_ray.report.findings import Findings, Point, Reliability

SIZE, DPI = (5.2, 3.5), 200
"""Inches, and dots an inch."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    paper: str
    ink: str
    soft: str
    line: str
    instances: str
    labels: str
    both: str
    third: str


LIGHT = Theme("light", "#ffffff", "#1c1e21", "#5b6068", "#dfe1e4", "#2368b8", "#c2620a", "#12806a", "#8a5aa8")
DARK = Theme("dark", "#1e2125", "#e9eaec", "#a3a9b1", "#3a4047", "#6aa9ec", "#eda04f", "#4fc3a6", "#c79be0")
MARKS = {"instances": "s", "labels": "^", "both": "o", "third": "D"}
RANKS_TOGETHER = 1.12
"""A figure's point is of the ranks up to so many times the first."""
Draw = Callable[[Any, Theme], None]


def draw_figures(evaluation: Evaluation, findings: Findings) -> dict[str, dict[str, bytes]]:
    """{figure: {"light": PNG, "dark": PNG}} of those figures that there is something to draw of."""
    settings = findings.settings
    drawings: dict[str, Draw] = {
        "trade-off": lambda axes, theme: _trade_off(axes, theme, findings.lambdas, settings.lambda_),
        "lambda": lambda axes, theme: _curves(
            axes, theme, findings.lambdas, [p.settings.lambda_ for p in findings.lambdas], settings.lambda_, "λ"
        ),
        "temperature": lambda axes, theme: _curves(
            axes,
            theme,
            findings.temperatures,
            [p.settings.temperature for p in findings.temperatures],
            settings.temperature,
            "temperature τ (log scale)",
            log=True,
        ),
        "neighbours": lambda axes, theme: _curves(
            axes,
            theme,
            findings.neighbours,
            [float(p.settings.neighbours.joint or 0) for p in findings.neighbours],
            settings.neighbours.joint,
            "neighbours b, from the joint memory (log scale)",
            log=True,
        ),
        "ranks": lambda axes, theme: _ranks(axes, theme, findings),
        "worth": lambda axes, theme: _worth(axes, theme, findings),
        "frequency": lambda axes, theme: _frequency(axes, theme, evaluation),
        "gain": lambda axes, theme: _gain(axes, theme, evaluation),
    }
    calibration = findings.calibration
    if calibration:
        drawings["reliability"] = lambda axes, theme: _reliability(
            axes, theme, calibration.scores, calibration.probabilities
        )
    return {name: {theme.name: _drawn(draw, theme) for theme in (LIGHT, DARK)} for name, draw in drawings.items()}


def _drawn(draw: Draw, theme: Theme) -> bytes:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    draw(axes, theme)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)
    axes.tick_params(colors=theme.soft, labelsize=10, length=3)
    axes.xaxis.label.set(color=theme.ink, size=11)
    axes.yaxis.label.set(color=theme.ink, size=11)
    axes.set_axisbelow(True)
    legend = axes.get_legend()
    for text in legend.get_texts() if legend else ():
        text.set_color(theme.ink)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _grid(axes: Any, theme: Theme) -> None:
    axes.grid(color=theme.line, linewidth=0.7)


def _legend(axes: Any, columns: int, **at: Any) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=10,
        borderaxespad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
        **at,
    )


def _line(axes: Any, theme: Theme, x: Sequence[float], y: Sequence[float], kind: str, label: str, **more: Any) -> None:
    style: dict[str, Any] = {"marker": MARKS[kind], "markersize": 4.5, "linewidth": 1.8, **more}
    axes.plot(x, y, color=getattr(theme, kind), label=label, **style)


def _trade_off(axes: Any, theme: Theme, points: Sequence[Point], chosen: float) -> None:
    x, y = [p.figures["P@1"] for p in points], [p.figures["PSP@1"] for p in points]
    axes.plot(x, y, "o-", color=theme.both, markersize=4, linewidth=1.8, zorder=2)
    turns = x.index(max(x))  # up to here the curve comes from the left
    named: list[tuple[float, float]] = []
    spread = (max(x) - min(x) or 1, max(y) - min(y) or 1)
    for i, point in enumerate(points[1:-1], 1):
        place = x[i] / spread[0], y[i] / spread[1]
        clear = all(abs(place[0] - one[0]) + abs(place[1] - one[1]) > 0.13 for one in named)
        if clear and point.settings.lambda_ != chosen and round(10 * point.settings.lambda_, 6).is_integer():
            named.append(place)
            before = i <= turns
            axes.annotate(
                f"{point.settings.lambda_:g}",
                (x[i], y[i]),
                xytext=(-7, 6) if before else (9, 0),
                textcoords="offset points",
                ha="right" if before else "left",
                va="center",
                color=theme.ink,
                fontsize=10,
            )
    at = [p.settings.lambda_ for p in points].index(chosen)
    ends: dict[str, Any] = {"linestyle": "none", "markersize": 8, "zorder": 3}
    axes.plot(x[0], y[0], MARKS["labels"], color=theme.labels, label="λ = 0", **ends)
    axes.plot(x[-1], y[-1], MARKS["instances"], color=theme.instances, label="λ = 1", **ends)
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": theme.ink, "markeredgewidth": 1.4}
    axes.plot(x[at], y[at], "o", label=f"λ in use: {chosen:g}", **{**ends, "markersize": 12}, **ring)
    axes.set(xlabel="P@1, percent", ylabel="PSP@1, percent")
    axes.margins(0.1)
    _grid(axes, theme)
    _legend(axes, 3, handletextpad=0.4)


def _curves(
    axes: Any,
    theme: Theme,
    points: Sequence[Point],
    x: Sequence[float],
    chosen: float | None,
    xlabel: str,
    *,
    log: bool = False,
) -> None:
    """P@1, PSP@1 and R@10 over a setting, with the setting in use marked."""
    for name, kind in (("P@1", "both"), ("PSP@1", "labels"), ("R@10", "third")):
        color = {"both": theme.ink, "labels": theme.soft, "third": theme.third}[kind]
        style = {"both": "-", "labels": "--", "third": ":"}[kind]
        axes.plot(
            x,
            [p.figures[name] for p in points],
            style,
            color=color,
            marker=MARKS[kind],
            markersize=4,
            linewidth=1.8,
            label=name,
        )
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_thinned(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if chosen is not None:
        axes.axvline(chosen, color=theme.both, linewidth=1.2, label=f"in use: {chosen:g}", zorder=1)
    axes.set(xlabel=xlabel, ylabel="percent")
    axes.set_ylim(bottom=0)
    _grid(axes, theme)
    _legend(axes, 4)


def _thinned(x: Sequence[float], most: int = 8) -> list[float]:
    """Tick places: so few of these that their labels do not touch on a log scale."""
    kept: list[float] = []
    for value in x:
        if not kept or value / kept[-1] >= (max(x) / min(x)) ** (1 / most):
            kept.append(value)
    return kept


def _ranks(axes: Any, theme: Theme, findings: Findings) -> None:
    """Whose keys stand at each rank."""
    sources = findings.sources
    x, instances = _by_rank(sources.instances.share_by_rank)
    _, labels = _by_rank(sources.labels.share_by_rank)
    colors = [theme.instances, theme.labels]
    axes.stackplot(x, instances, labels, labels=["instances", "labels"], colors=colors, linewidth=0, alpha=0.9)
    axes.set(ylabel="percent of the keys at that rank", ylim=(0, 100))
    _rank_axis(axes, len(sources.instances.share_by_rank))
    _legend(axes, 2)


def _worth(axes: Any, theme: Theme, findings: Findings) -> None:
    """How often a key at a rank votes for a right label."""
    sources = findings.sources
    for kind, of_kind in (("instances", sources.instances), ("labels", sources.labels)):
        x, percent = _by_rank(of_kind.right_by_rank)
        _line(axes, theme, x, percent, kind, kind)
    axes.set(ylabel="percent that vote for a right label")
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))
    _rank_axis(axes, len(sources.instances.right_by_rank))
    _grid(axes, theme)
    _legend(axes, 2)


def _by_rank(shares: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """(ranks, percent): ranks that are close to each other on a log scale are taken together."""
    x, percent, first = [], [], 1
    while first <= len(shares):
        end = max(first, round(first * RANKS_TOGETHER))
        known = [(rank, share) for rank, share in enumerate(shares[first - 1 : end], first) if share is not None]
        if known:
            x.append(sum(rank for rank, _ in known) / len(known))
            percent.append(100 * sum(share for _, share in known) / len(known))
        first = end + 1
    return x, percent


def _rank_axis(axes: Any, ranks: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(1, max(2, ranks))
    axes.xaxis.set_major_locator(FixedLocator([n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n <= ranks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("rank of the key (log scale)")


def _frequency(axes: Any, theme: Theme, evaluation: Evaluation) -> None:
    """Pairs found, by how frequent their label is."""
    groups = [group for group in evaluation.breakdown.tenths if group.recall]
    x = range(len(groups))
    for row, kind in ((LABELS_ONLY, "labels"), (INSTANCES_ONLY, "instances"), (BOTH, "both")):
        _line(axes, theme, x, [group.recall[row] for group in groups], kind, row)
    axes.set_ylabel(f"percent of pairs found in {evaluation.breakdown.k}")
    axes.set_ylim(bottom=0)
    _frequency_axis(axes, groups)
    _grid(axes, theme)
    _legend(axes, 3)


def _gain(axes: Any, theme: Theme, evaluation: Evaluation) -> None:
    """What both kinds of keys together find more than one alone, by how frequent the label is."""
    groups = [group for group in evaluation.breakdown.tenths if group.recall]
    for row, kind, aside in ((LABELS_ONLY, "labels", -0.2), (INSTANCES_ONLY, "instances", 0.2)):
        gains = [group.recall[BOTH] - group.recall[row] for group in groups]
        places = [i + aside for i in range(len(groups))]
        axes.bar(places, gains, 0.38, color=getattr(theme, kind), label=f"over {row}")
    axes.axhline(0, color=theme.soft, linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1), max(high, 1))
    axes.set_ylabel("percentage points more, with both")
    _frequency_axis(axes, groups)
    axes.grid(color=theme.line, linewidth=0.7, axis="y")
    _legend(axes, 2)


def _frequency_axis(axes: Any, groups: Sequence[LabelGroup]) -> None:
    spans = [_span(group.most, group.least) for group in groups]
    long = sum(map(len, spans)) > 24
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(len(groups)), spans, **turned)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xlabel("training instances of the labels, head to tail")


def _span(most: int, least: int) -> str:
    return f"{most:,}" if most == least else f"{most:,}–{least:,}"


def _reliability(axes: Any, theme: Theme, scores: Reliability, probabilities: Reliability) -> None:
    axes.plot([0, 1], [0, 1], "--", color=theme.soft, linewidth=1.2, label="exactly right")
    for one, kind, name in ((scores, "third", "score p̂"), (probabilities, "both", "probability")):
        x, y = [b.probability for b in one.bins], [b.right for b in one.bins]
        _line(axes, theme, x, y, kind, f"{name}, ECE {one.error:.3f}")
    axes.set(xlabel="what is said: mean of the bin", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    _grid(axes, theme)
    _legend(axes, 2)


def alternatives(evaluation: Evaluation, findings: Findings) -> Mapping[str, str]:
    """{figure: what it shows, in words}, for those who do not see it."""
    first, last = findings.lambdas[0].figures, findings.lambdas[-1].figures
    return {
        "trade-off": f"PSP@1 over P@1 as lambda goes from 0 (P@1 {first['P@1']:.1f}, PSP@1 {first['PSP@1']:.1f}) to "
        f"1 (P@1 {last['P@1']:.1f}, PSP@1 {last['PSP@1']:.1f})",
        "lambda": "P@1, PSP@1 and R@10 over lambda",
        "temperature": "P@1, PSP@1 and R@10 over the temperature",
        "neighbours": "P@1, PSP@1 and R@10 over the number of neighbours",
        "ranks": "Share of instances and labels among the keys at each rank",
        "worth": "Share of the keys at each rank that vote for a right label, for instances and labels",
        "frequency": "Share of the pairs found, from frequent labels to rare ones: labels only, instances only, both",
        "gain": "What both find more than labels only and than instances only, from frequent labels to rare ones",
        "reliability": "Share of right labels over the score, and over the fitted probability",
    }
