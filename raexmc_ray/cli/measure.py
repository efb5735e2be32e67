"""Commands that say how good a memory is, and make it better without training: evaluate, compare, tune."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.table import Table

from raexmc_ray.cli.options import Overrides, RecipeFile, read_run
from raexmc_ray.cli.output import console, print_plain


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    output: Annotated[str | None, typer.Option(help="Write the evaluation here, too: JSON, rows beside it.")] = None,
    report: Annotated[
        str | None, typer.Option(help="Folder or URL for a report: a page, its figures and data.")
    ] = None,
    predictions: Annotated[
        str | None, typer.Option(help="Measure what `raexmc score` wrote for the test part here, not the memory.")
    ] = None,
) -> None:
    """Measure the memory on the corpus's test part: labels only, instances only, both, and popularity."""
    if predictions and report:
        raise ValueError("--report looks into the memory, and --predictions at what was written: give one of them")
    settings, corpus = read_run(recipe, overrides)
    from raexmc_ray.cluster import SLEEP_WHEN_IDLE, connected

    os.environ.update(SLEEP_WHEN_IDLE)  # before FAISS is imported, by what follows
    from raexmc_ray.evaluation import EVALUATION, format_table
    from raexmc_ray.evaluation import evaluate as measure_memory
    from raexmc_ray.evaluation.predictions import PREDICTIONS, evaluate_predictions
    from raexmc_ray.files import Folder
    from raexmc_ray.memory.pool import open_in_actors
    from raexmc_ray.report import Study, write_report

    storage = Folder.at(settings.cluster.storage)
    if predictions:
        measured = evaluate_predictions(Folder.at(predictions), corpus, settings.corpus, recipe=settings)
        measured.save(storage, PREDICTIONS)
    else:
        with connected():
            memory, pool = open_in_actors(storage / "memory")
            with pool:
                study = Study(memory, corpus, settings.corpus, settings.prediction) if report else None
                measured = measure_memory(
                    memory, corpus, settings.corpus, settings.prediction, recipe=settings, observer=study
                )
                measured.save(storage, EVALUATION)  # before what may fail
                if report and study:
                    page = write_report(measured, study.findings(), Folder.at(report))
                    console.print(f"report: {page}", soft_wrap=True)
    if output:
        target = Folder.at(output)
        measured.save(target.parent, target.name)
    print_plain(format_table(measured.table))


def compare(
    a: Annotated[str, typer.Argument(help="Evaluation: the JSON that `raexmc evaluate` wrote.")],
    b: Annotated[str, typer.Argument(help="Another one, of the same rows.")],
    row: Annotated[str, typer.Option(help="Row of the tables that is compared.")] = "both",
    resamples: Annotated[int, typer.Option(min=2000, help="How often rows are drawn anew.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """Say whether B is better than A by more than chance: paired bootstrap over the rows of the test part."""
    from raexmc_ray.evaluation import load
    from raexmc_ray.evaluation.compare import compare
    from raexmc_ray.files import Folder

    sides = load(Folder.at(a)), load(Folder.at(b))
    found = compare(*sides, row, resamples=resamples, seed=seed)
    if as_json:
        print_plain(json.dumps([one.model_dump() for one in found], indent=2))
        return
    table = Table(title=f"{row}, {sides[0].evaluation.evaluated:,} rows, percent", title_justify="left", box=None)
    for name in ("metric", "A", "B", "B − A", "95% interval", "beyond chance"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for one in found:
        figures = (f"{one.a:.2f}", f"{one.b:.2f}", f"{one.difference:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}")
        table.add_row(one.metric, *figures, "yes" if one.beyond_chance else "no")
    console.print(table)


def tune(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    metric: Annotated[str | None, typer.Option(help="Make this metric best, not the mean of five.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Held-out training rows to look at.")] = 5000,
) -> None:
    """Choose lambda, temperature and neighbours on held-out training rows; they become the memory's defaults."""
    from raexmc_ray.evaluation.sweep import FIGURES, SWEPT

    if metric is not None and metric not in SWEPT:
        raise ValueError(f"--metric {metric}: choose one of {', '.join(SWEPT)}")
    settings, corpus = read_run(recipe, overrides)
    from raexmc_ray.cluster import SLEEP_WHEN_IDLE, connected

    os.environ.update(SLEEP_WHEN_IDLE)  # before FAISS is imported, by what follows
    from raexmc_ray.evaluation import format_table
    from raexmc_ray.evaluation.held_out import held_out_rows
    from raexmc_ray.evaluation.tune import TUNING, publish_tuned, tune
    from raexmc_ray.files import Folder
    from raexmc_ray.memory.pool import open_in_actors

    storage = Folder.at(settings.cluster.storage)
    with connected():
        memory, pool = open_in_actors(storage / "memory")
        with pool:
            held_out = held_out_rows(settings, corpus, memory, rows)
            tuned = tune(memory, corpus, settings.corpus, held_out, [metric] if metric else FIGURES)
    tuned = publish_tuned(storage / "memory", memory.snapshot, corpus, tuned)
    (storage / TUNING).write(tuned.model_dump_json(indent=2, by_alias=True).encode() + b"\n")
    print_plain(f"chosen on {tuned.rows}; {tuned.tried} settings tried. On these same rows:")
    if tuned.warning:
        print_plain(f"WARNING: {tuned.warning}")
    print_plain(format_table({"before": tuned.figures_before, "after": tuned.figures_after}))
    chosen = tuned.after.model_dump_json(by_alias=True, exclude_none=True)
    if tuned.snapshot_after is None:
        print_plain(f"the defaults of snapshot {tuned.snapshot_before} were the best: {chosen}")
    else:
        print_plain(f"snapshot {tuned.snapshot_after} has them as its defaults: {chosen}")
        print_plain("a running application moves to it by `raexmc rollout`, and back by `raexmc rollback`")
        print_plain("for `raexmc evaluate` and the next `raexmc build`, set them as the recipe's prediction, too")
