"""Writes the report: one page that needs nothing else, and beside it the figures and the data it is made of."""

from __future__ import annotations

from base64 import b64encode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup  # it comes with Jinja

from raexmc_ray.evaluation.result import Measured
from raexmc_ray.files import Folder
from raexmc_ray.recipe import METRICS
from raexmc_ray.report.figures import alternatives, draw_figures
from raexmc_ray.report.findings import Findings

PAGE, FINDINGS, TEMPLATE = "index.html", "findings.json", "page.html.j2"


def write_report(measured: Measured, findings: Findings, folder: Folder) -> Folder:
    """Write index.html, a PNG for each figure, findings.json, and the evaluation; returns the page.

    The page has all of it inside: no request leaves it, and it needs no JavaScript.
    """
    figures = draw_figures(measured.evaluation, findings)
    for name, drawn in figures.items():
        for theme, picture in drawn.items():
            (folder / (f"{name}.png" if theme == "light" else f"{name}-{theme}.png")).write(picture)
    measured.save(folder)
    (folder / FINDINGS).write(findings.model_dump_json(indent=2, by_alias=True).encode() + b"\n")
    page = folder / PAGE
    page.write(render(measured, findings, figures).encode())
    return page


def render(measured: Measured, findings: Findings, figures: dict[str, dict[str, bytes]]) -> str:
    """The page. Everything that comes from data is escaped."""
    environment = Environment(
        loader=PackageLoader("raexmc_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.1f}"
    environment.globals["picture"] = _Pictures(figures, dict(alternatives(measured.evaluation, findings))).picture
    metrics = [name for name in METRICS if name in next(iter(measured.table.values()))]
    return environment.get_template(TEMPLATE).render(
        evaluation=measured.evaluation, findings=findings, metrics=metrics, figures=figures
    )


class _Pictures:
    """The figures as elements of the page."""

    def __init__(self, figures: dict[str, dict[str, bytes]], said: dict[str, str]) -> None:
        self._figures, self._said = figures, said

    def picture(self, name: str) -> Markup:
        """An element with a figure, light or dark as the page is."""
        light, dark = (_data_uri(self._figures[name][theme]) for theme in ("light", "dark"))
        return Markup(
            '<picture><source media="(prefers-color-scheme: dark)" srcset="{}"><img src="{}" alt="{}"></picture>'
        ).format(dark, light, self._said[name])


def _data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{b64encode(picture).decode()}"
