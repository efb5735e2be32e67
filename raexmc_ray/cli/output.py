"""What commands print: on standard output, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from raexmc_ray.answer import ScoredLabel
    from raexmc_ray.files import Folder
    from raexmc_ray.inputs.job import Job, Summary

console = Console(markup=False, emoji=False)  # what is printed is what there is, brackets and colons too


def print_answer(text: str, labels: Sequence[ScoredLabel]) -> None:
    """The labels of one text as a table, with the evidence for each."""
    table = Table(title=_shown(text), title_justify="left", pad_edge=False, box=None)
    for name, justify in (("score", "right"), ("label", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's literals
    for label in labels:
        table.add_row(f"{label.score:.4f}", _shown(label.text))
        for vote in label.evidence or []:
            said = f"{vote.share:>4.0%} from {vote.kind}, cosine {vote.similarity:.2f}: {vote.text}"
            table.add_row("", _shown(f"  {said}", "dim"))
    console.print(table)
    console.print()


def _shown(text: str, style: str = "") -> Text:
    """A text that comes from anywhere: a terminal would obey its control characters."""
    return Text(re.sub("[\x00-\x1f\x7f-\x9f]", " ", text), style)


def print_summary(summary: Summary, output: Folder, kind: type[Job]) -> None:
    """What came of a job over input files. Raises ValueError where no row could be used."""
    from raexmc_ray.inputs.job import REJECTED  # PyArrow, which other commands do without

    if not summary.results:
        raise ValueError(f"{summary}: see {output / REJECTED}")
    console.print(f"{kind.VERB}: {summary}: {output / kind.PARTS}", soft_wrap=True, highlight=False)


def print_plain(text: str) -> None:
    """`text` on standard output as it is: no colours, no wrapping."""
    console.print(text, soft_wrap=True, highlight=False)


def say_bytes(size: float) -> str:
    """A size for people: 12.3 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} bytes"
