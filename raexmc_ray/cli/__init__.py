"""The command `raexmc`: a few lines a command over the library. What a command needs is imported when it runs, so that
`raexmc --help` does not wait for torch, Ray and FAISS."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from raexmc_ray.cli.apply import query, score
from raexmc_ray.cli.make import build, embed, train
from raexmc_ray.cli.measure import compare, evaluate, tune
from raexmc_ray.cli.memory import inspect, plan
from raexmc_ray.cli.output import print_answer, print_plain
from raexmc_ray.cli.serving import rollback, rollout, serve
from raexmc_ray.processor import avoid_slow_sort
from raexmc_ray.serve.errors import DeploymentFailedError
from raexmc_ray.train.errors import WorkersFailedError

__all__ = ["app", "main", "print_answer", "print_plain"]

app = typer.Typer(
    help="Extreme multi-label text classification on Ray: which of these millions of labels fit this text?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    train, build, embed, evaluate, compare, tune, score, serve, rollout, rollback, query, inspect, plan
):  # fmt: skip
    app.command()(_command)


@app.callback()
def _common(quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress lines.")] = False) -> None:
    from raexmc_ray.progress import Progress

    Progress.quiet = quiet
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("faiss", "faiss.loader", "httpx", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main(arguments: list[str] | None = None) -> None:
    """Run the command, by default the one of the command line; what a user did wrong is said in one line, without a
    trace."""
    avoid_slow_sort()
    try:
        app(arguments)
    except (ValueError, OSError, ArithmeticError, DeploymentFailedError, WorkersFailedError) as error:
        Console(stderr=True).print(Text.assemble(("error:", "red"), f" {error}"), soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
