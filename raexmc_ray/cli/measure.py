"""Commands that say how good a memory is: evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raexmc_ray.cli.options import Overrides, RecipeFile, read_run
from raexmc_ray.cli.output import print_plain


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    output: Annotated[Path | None, typer.Option(help="Write the table as JSON here, too.")] = None,
) -> None:
    """Measure the memory on the corpus's test part: labels only, instances only, both, and popularity."""
    settings, corpus = read_run(recipe, overrides)
    from raexmc_ray.cluster import connected
    from raexmc_ray.evaluation import evaluate, format_table
    from raexmc_ray.files import Folder
    from raexmc_ray.memory.pool import open_in_actors

    with connected():
        memory, pool = open_in_actors(Folder.at(settings.cluster.storage) / "memory")
        with pool:
            table = evaluate(memory, corpus, settings.corpus, settings.prediction)
    result = {
        "snapshot": memory.manifest.id,
        "settings": settings.model_dump(mode="json", by_alias=True),
        "table": table,
    }
    text = json.dumps(result, indent=2) + "\n"
    (Folder.at(settings.cluster.storage) / "evaluation.json").write(text.encode())
    if output:
        output.write_text(text)
    print_plain(format_table(table))
