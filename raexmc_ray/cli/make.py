"""Commands that make something: train, build, embed."""

from __future__ import annotations

from typing import Annotated

import typer

from raexmc_ray.cli.options import Overrides, RecipeFile, read_run
from raexmc_ray.cli.output import console, print_summary


def train(recipe: RecipeFile, overrides: Overrides = []) -> None:  # noqa: B006  # typer copies it
    """Train the text encoder on a corpus. Stopped, the same command goes on from the last checkpoint."""
    settings, corpus = read_run(recipe, overrides)
    from raexmc_ray.cluster import connected
    from raexmc_ray.train.trainer import train

    with connected():
        console.print(f"encoder: {train(settings, corpus)}", soft_wrap=True)


def build(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    encoder: Annotated[
        str | None,
        typer.Option(help="Any encoder in place of the trained one: folder or URL, hub name, package:NAME."),
    ] = None,
) -> None:
    """Embed a corpus and publish its knowledge memory. Stopped, the same command goes on."""
    settings, corpus = read_run(recipe, overrides)
    from raexmc_ray.cluster import connected
    from raexmc_ray.embed import stage_encoder
    from raexmc_ray.files import Folder
    from raexmc_ray.memory.build import build
    from raexmc_ray.train.trainer import trained_encoder

    if encoder:
        section = settings.encoder.model_copy(update={"model": encoder})
        settings = settings.model_copy(update={"encoder": section})
        tower = stage_encoder(Folder.at(settings.cluster.storage), encoder, section)
    else:
        tower = trained_encoder(settings, corpus)
    with connected():
        snapshot = build(settings, corpus, tower, trained=not encoder)
    # Not the URL as it was given: it may carry credentials.
    console.print(f"memory: {Folder.at(settings.cluster.storage) / 'memory'}, snapshot {snapshot}", soft_wrap=True)


def embed(
    inputs: Annotated[list[str], typer.Argument(help="Parquet, JSON-lines and text files, globs, folders or URLs.")],
    encoder: Annotated[str, typer.Option(help="Any encoder: folder or URL, hub name, package:NAME.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for embeddings and rejected rows.")],
    id_column: Annotated[str, typer.Option(help="Column with the id of a row.")] = "id",
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column with the text of a row; several are joined. [default: text]")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=3, help="Texts are cut to so many tokens; if left out, as the encoder was saved, or 32."),
    ] = None,
    half: Annotated[bool, typer.Option(help="Write float16, not float32.")] = False,
    encoders: Annotated[int, typer.Option(min=1, help="Encoder actors.")] = 2,
    gpu: Annotated[bool, typer.Option(help="Give each encoder actor a GPU.")] = False,
) -> None:
    """Embed the texts of any files. Stopped, the same command goes on."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.embed_files import EmbedJob, embed_files
    from raexmc_ray.files import Folder
    from raexmc_ray.inputs.rows import Columns
    from raexmc_ray.recipe import ClusterSection, EncoderSection

    target = Folder.at(output)
    with connected():
        summary = embed_files(
            inputs,
            target,
            encoder,
            EncoderSection(**({"max_tokens": max_tokens} if max_tokens else {})),
            ClusterSection(encoders=encoders, gpu=gpu),
            Columns(id_column, tuple(text_column or ["text"])),
            dtype="float16" if half else "float32",
        )
    print_summary(summary, target, EmbedJob)
