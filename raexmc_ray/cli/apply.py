"""Commands that label texts: score, query."""

from __future__ import annotations

from typing import Annotated

import typer

from raexmc_ray.cli.output import print_answer, print_plain, print_summary
from raexmc_ray.recipe import Precision


def score(
    memory: Annotated[str, typer.Argument(help="Folder or URL of the memory.")],
    inputs: Annotated[list[str], typer.Argument(help="Parquet, JSON-lines and text files, globs, folders or URLs.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for predictions and rejected rows.")],
    k: Annotated[int | None, typer.Option(help="Labels for each text.")] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="1: instances only, 0: labels only.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the softmax over the neighbours.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Keys retrieved from the joint memory.")] = None,
    evidence: Annotated[int, typer.Option(min=0, help="Keys named for each label.")] = 0,
    snapshot: Annotated[str | None, typer.Option(help="Of the memory; its current one where left out.")] = None,
    id_column: Annotated[str, typer.Option(help="Column with the id of a row.")] = "id",
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column with the text of a row; several are joined. [default: text]")
    ] = None,
    encoders: Annotated[
        int | None,
        typer.Option(min=1, help="Encoder actors at most: 2, or with --gpu as many as there are GPUs now."),
    ] = None,
    gpu: Annotated[bool, typer.Option(help="Give each encoder actor a GPU.")] = False,
    precision: Annotated[
        Precision,
        typer.Option(
            help="auto: bfloat16 on GPUs, float32 on CPUs; CPUs that have bfloat16 are 1.6 times as fast in it."
        ),
    ] = "auto",
) -> None:
    """Label whole data sets. Stopped, the same command goes on."""
    from raexmc_ray.cluster import connected, count_gpus
    from raexmc_ray.files import Folder
    from raexmc_ray.inputs.rows import Columns
    from raexmc_ray.local import override
    from raexmc_ray.memory.snapshot import open_snapshot
    from raexmc_ray.recipe import ClusterSection
    from raexmc_ray.score.run import ScoreJob, score

    folder, target = Folder.at(memory), Folder.at(output)
    opened = open_snapshot(folder, snapshot)  # and no other, though a newer one is published meanwhile
    settings = override(opened.manifest.defaults, k, lambda_, temperature, neighbours)
    with connected():
        summary = score(
            folder,
            inputs,
            target,
            settings,
            ClusterSection(encoders=encoders or (count_gpus() if gpu else 2), gpu=gpu),
            Columns(id_column, tuple(text_column or ["text"])),
            evidence=evidence,
            snapshot=opened.manifest.id,
            precision=precision,
        )
    print_summary(summary, target, ScoreJob)


def query(
    texts: Annotated[list[str], typer.Argument(help="Texts to label.")],
    url: Annotated[str, typer.Option(help="Where the application answers.")] = "http://127.0.0.1:8000",
    k: Annotated[int | None, typer.Option(help="Labels for each text.")] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="1: instances only, 0: labels only.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the softmax over the neighbours.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Keys retrieved from the joint memory.")] = None,
    evidence: Annotated[int, typer.Option(help="Keys named for each label.")] = 0,
    token: Annotated[str | None, typer.Option(envvar="RAEXMC_TOKEN", help="Bearer token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reply as JSON.")] = False,
) -> None:
    """Ask a running application for the labels of texts."""
    from raexmc_ray.client import ApiError, Client, UnreachableError

    try:
        with Client(url, token=token) as client:
            reply = client.predict(
                texts, k, lambda_=lambda_, temperature=temperature, neighbours=neighbours, evidence=evidence
            )
    except UnreachableError as error:
        raise ValueError(f"nothing answers at {error}: start it with `raexmc serve MEMORY`") from None
    except ApiError as error:
        raise ValueError(f"{url}: {error}") from None
    if as_json:
        print_plain(reply.model_dump_json(indent=2))
        return
    for text, answer in zip(texts, reply.answers, strict=True):
        print_answer(text, answer.labels)
