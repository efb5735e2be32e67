"""The command `raexmc`: a few lines a command over the library."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raexmc_ray.recipe import Recipe
from raexmc_ray.serve.errors import DeploymentFailedError

if TYPE_CHECKING:
    from raexmc_ray.answer import ScoredLabel

app = typer.Typer(
    help="Extreme multi-label text classification on Ray: which of these millions of labels fit this text?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="YAML file with every setting of the run.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a setting: section.field=value. May be repeated.")
]


@app.callback()
def _common(quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress lines.")] = False) -> None:
    from raexmc_ray.progress import Progress

    Progress.quiet = quiet
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("faiss", "faiss.loader", "httpx", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = []) -> None:  # noqa: B006  # typer copies it
    """Train the text encoder on a corpus. Stopped, the same command goes on from the last checkpoint."""
    settings, corpus = _read(recipe, overrides)
    from raexmc_ray.cluster import connected
    from raexmc_ray.train.trainer import train

    with connected():
        console.print(f"encoder: {train(settings, corpus)}", soft_wrap=True)


@app.command()
def build(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    encoder: Annotated[
        str | None,
        typer.Option(help="Any encoder in place of the trained one: folder, hub name, package:NAME."),
    ] = None,
) -> None:
    """Embed a corpus and publish its knowledge memory. Stopped, the same command goes on."""
    settings, corpus = _read(recipe, overrides)
    from raexmc_ray.cluster import connected
    from raexmc_ray.embed import stage_encoder
    from raexmc_ray.files import Folder
    from raexmc_ray.memory.build import build
    from raexmc_ray.train.trainer import trained_encoder

    if encoder:
        tower = stage_encoder(Folder.at(settings.cluster.storage), encoder, settings.encoder)
    else:
        tower = trained_encoder(settings, corpus)
    with connected():
        snapshot = build(settings, corpus, tower)
    # Not the URL as it was given: it may carry credentials.
    console.print(f"memory: {Folder.at(settings.cluster.storage) / 'memory'}, snapshot {snapshot}", soft_wrap=True)


@app.command()
def embed(
    inputs: Annotated[list[str], typer.Argument(help="Parquet, JSON-lines and text files, globs, folders or URLs.")],
    encoder: Annotated[str, typer.Option(help="Any encoder: folder, hub name, package:NAME.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for the embeddings.")],
    id_column: Annotated[str, typer.Option(help="Column with the id of a row.")] = "id",
    text_column: Annotated[str, typer.Option(help="Column with the text of a row.")] = "text",
    max_tokens: Annotated[int, typer.Option(min=3, help="Texts are cut to so many tokens.")] = 32,
    half: Annotated[bool, typer.Option(help="Write float16, not float32.")] = False,
    encoders: Annotated[int, typer.Option(min=1, help="Encoder actors.")] = 2,
    gpu: Annotated[bool, typer.Option(help="Give each encoder actor a GPU.")] = False,
) -> None:
    """Embed the texts of any files. Stopped, the same command goes on."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.embed import embed_files
    from raexmc_ray.files import Folder
    from raexmc_ray.recipe import ClusterSection, EncoderSection
    from raexmc_ray.rows import Columns

    with connected():
        done = embed_files(
            inputs,
            Folder.at(output),
            encoder,
            EncoderSection(max_tokens=max_tokens),
            ClusterSection(encoders=encoders, gpu=gpu),
            Columns(id_column, text_column),
            dtype="float16" if half else "float32",
        )
    console.print(f"{done.keys:,} embeddings: {done.folder}", soft_wrap=True)


@app.command()
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    output: Annotated[Path | None, typer.Option(help="Write the table as JSON here, too.")] = None,
) -> None:
    """Measure the memory on the corpus's test part: labels only, instances only, both, and popularity."""
    settings, corpus = _read(recipe, overrides)
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


@app.command()
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
    text_column: Annotated[str, typer.Option(help="Column with the text of a row.")] = "text",
    encoders: Annotated[
        int | None, typer.Option(min=1, help="Encoder actors at most: 2, or as many as there are GPUs.")
    ] = None,
    gpu: Annotated[bool, typer.Option(help="Give each encoder actor a GPU.")] = False,
) -> None:
    """Label whole data sets. Stopped, the same command goes on."""
    from raexmc_ray.cluster import connected, count_gpus
    from raexmc_ray.files import Folder
    from raexmc_ray.local import override
    from raexmc_ray.memory.snapshot import open_snapshot
    from raexmc_ray.recipe import ClusterSection
    from raexmc_ray.rows import Columns
    from raexmc_ray.score import score
    from raexmc_ray.score_job import PREDICTED

    folder, target = Folder.at(memory), Folder.at(output)
    settings = override(open_snapshot(folder, snapshot).manifest.defaults, k, lambda_, temperature, neighbours)
    with connected():
        summary = score(
            folder,
            inputs,
            target,
            settings,
            ClusterSection(encoders=encoders or (count_gpus() if gpu else 2), gpu=gpu),
            Columns(id_column, text_column),
            evidence=evidence,
            snapshot=snapshot,
        )
    console.print(f"{summary}: {target / PREDICTED}", soft_wrap=True, highlight=False)


@app.command()
def serve(
    memory: Annotated[str, typer.Argument(help="Folder or URL of the memory.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    tokens_file: Annotated[
        str | None, typer.Option(help="File of bearer tokens, one a line; also: RAEXMC_TOKENS.")
    ] = None,
    anonymous_access: Annotated[
        bool, typer.Option(help="Answer anyone who reaches the port, without a token.")
    ] = False,
    encoder_cpus: Annotated[
        int | None, typer.Option(min=1, help="Threads of the encoder; those of the machine, four at most, if left out.")
    ] = None,
    shard_replicas: Annotated[int, typer.Option(min=1, help="Replicas of each shard.")] = 1,
) -> None:
    """Answer over HTTP until Ctrl-C, with a page to try it. On a cluster: `serve deploy serve_configs/cluster.yaml`."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.serve.gate import CALLBACK, REQUESTS
    from raexmc_ray.serve.run import serving
    from raexmc_ray.serve.schema import ServeSettings

    settings = ServeSettings.model_validate(
        {
            "memory": memory,
            "tokens_file": tokens_file,
            "anonymous_access": anonymous_access,
            "encoder_cpus": encoder_cpus or min(4, os.cpu_count() or 1),
            "shard_replicas": shard_replicas,
        }
    )
    os.environ |= {**CALLBACK, REQUESTS: str(settings.limits.concurrent_requests)}  # a cluster that is started has them
    with connected(dashboard=True), serving(settings, host=host, port=port) as url:
        console.print(
            f"{url} has the page, {url}/v1 the API, {url}/openapi.json its description; Ctrl-C ends it", soft_wrap=True
        )
        _wait_for_interrupt()


Application = Annotated[str, typer.Option(help="Name of the application in the Serve config.")]


@app.command()
def rollout(
    snapshot: Annotated[
        str | None, typer.Argument(help="Snapshot to move to; the memory's current one where left out.")
    ] = None,
    application: Application = "raexmc",
) -> None:
    """Move a running application to another snapshot of its memory, while it answers. Needs RAY_ADDRESS."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.serve.run import rollout

    with connected(existing=True):
        before, after = rollout(snapshot, application)
    console.print(f"{application} answers from {after}; before it was {before}", soft_wrap=True)


@app.command()
def rollback(application: Application = "raexmc") -> None:
    """Move a running application back to the snapshot before, and make that the memory's current one."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.serve.run import rollback

    with connected(existing=True):
        before, after = rollback(application)
    console.print(f"{application} answers from {after} again, no longer from {before}", soft_wrap=True)


@app.command()
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


@app.command()
def inspect(
    memory: Annotated[str, typer.Argument(help="Folder or URL of the memory.")],
    verify: Annotated[bool, typer.Option(help="Read every byte against its checksum.")] = False,
) -> None:
    """Say what is in a memory: keys, shards, bytes by part, snapshots."""
    from raexmc_ray.files import Folder
    from raexmc_ray.memory import snapshot
    from raexmc_ray.progress import Progress

    folder = Folder.at(memory)
    opened = snapshot.open_snapshot(folder)
    manifest = opened.manifest
    table = Table(title=str(folder), show_header=False, title_justify="left")
    total = sum(entry.size for entry in manifest.files.values())
    sizes = [f"{part} {_bytes(size)}" for part, size in manifest.bytes_by_part().items()]
    lists = f", {manifest.index.probes} of {manifest.index.lists:,} lists probed" if manifest.index.lists else ""
    others = [name for name in snapshot.list_snapshots(folder) if name != manifest.id]
    for name, value in (
        ("snapshot", f"{manifest.id} (current), made {manifest.created}"),
        ("others", ", ".join(others) or "none"),
        ("keys", f"{manifest.keys:,}: {manifest.instances:,} instances and {manifest.labels:,} labels"),
        ("shards", f"{manifest.shards}, {manifest.index.kind} index{lists}, dimension {manifest.dimension}"),
        ("size", f"{_bytes(total)} in {len(manifest.files)} files: {', '.join(sizes)}"),
        ("encoder", manifest.encoder_fingerprint[:16]),
        ("defaults", manifest.defaults.model_dump_json(by_alias=True, exclude_none=True)),
    ):
        table.add_row(name, value)
    console.print(table)
    if verify:
        with Progress("verify", total, "bytes") as progress:
            for size in snapshot.verify(opened):
                progress.add(size)
        console.print(f"every byte of {len(manifest.files)} files is as the manifest says")


@app.command()
def plan(
    instances: Annotated[int, typer.Option(min=0, help="Training instances.")],
    labels: Annotated[int, typer.Option(min=1, help="Labels.")],
    dimension: Annotated[int, typer.Option(min=1, help="Numbers in an embedding.")] = 768,
    index: Annotated[str, typer.Option(help="Kind of index, as memory.index in a recipe.")] = "flat",
    machines: Annotated[int, typer.Option(min=1, help="Machines, all alike.")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB of memory of each machine.")] = 64,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each machine.")] = 16,
    texts_per_second: Annotated[float, typer.Option(min=0.1, help="That one machine embeds; measure it.")] = 1000,
    text_bytes: Annotated[float, typer.Option(min=0, help="Of a mean text.")] = 80,
    labels_per_instance: Annotated[float, typer.Option(min=0, help="Mean number.")] = 5,
) -> None:
    """Say what a memory will take before it is built: shards, memory, disk, hours."""
    from raexmc_ray.memory.plan import plan_memory

    planned = plan_memory(
        Recipe.parse({"corpus": {"path": ""}, "memory": {"index": index}}, source="--index").memory,
        instances=instances,
        labels=labels,
        dimension=dimension,
        machines=machines,
        machine_memory=int(memory * 2**30),
        machine_cpus=cpus,
        texts_per_second=texts_per_second,
        text_bytes=text_bytes,
        labels_per_instance=labels_per_instance,
    )
    spec = planned.index
    table = Table(show_header=False)
    lists = f", {spec.probes} of {spec.lists:,} lists probed" if spec.lists else ""
    for name, value in (
        ("keys", f"{planned.keys:,} of {dimension} numbers, {spec.kind} index{lists}"),
        ("shards", f"{planned.shards} (memory.shards), {planned.shards // machines} a machine"),
        ("memory", f"{_bytes(planned.shard_memory)} a shard, {_bytes(planned.shards * planned.shard_memory)} in all"),
        ("disk", f"{_bytes(planned.shard_disk)} a shard, {_bytes(planned.shards * planned.shard_disk)} in all"),
        ("beside it", f"{_bytes(planned.embeddings_disk)} of embeddings, which may go once it is built"),
        ("building", f"{_bytes(planned.build_memory)} of memory for each shard that is built at a time"),
        ("to embed", f"{planned.embed_hours:.2f} hours at {texts_per_second:,.0f} texts/s a machine"),
        ("to build", f"{planned.build_hours:.2f} hours"),
    ):
        table.add_row(name, value)
    console.print(table)


def _bytes(size: float) -> str:
    """A size for people: 12.3 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} bytes"


def print_answer(text: str, labels: Sequence[ScoredLabel]) -> None:
    """The labels of one text as a table, with the evidence for each."""
    table = Table(title=_escape(text), title_justify="left", pad_edge=False, box=None)
    for name, justify in (("score", "right"), ("label", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's literals
    for label in labels:
        table.add_row(f"{label.score:.4f}", _escape(label.text))
        for vote in label.evidence or []:
            said = f"{vote.share:>4.0%} from {vote.kind}, cosine {vote.similarity:.2f}: {vote.text}"
            table.add_row("", f"[dim]  {_escape(said)}[/dim]")
    console.print(table)
    console.print()


def print_plain(text: str) -> None:
    """`text` on standard output as it is: no colours, no wrapping."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _read(recipe: Path, overrides: list[str]) -> tuple[Recipe, Any]:
    from raexmc_ray.corpus import read_corpus

    settings = Recipe.load(recipe, overrides)
    corpus = read_corpus(settings.corpus.path, settings.corpus.fields, settings.corpus.holdout)
    console.print(f"corpus: {corpus.describe()}", soft_wrap=True, highlight=False)
    return settings, corpus


def _wait_for_interrupt() -> None:
    import threading

    threading.Event().wait()


def main() -> None:
    """Run the command; what a user did wrong is said in one line, without a trace."""
    try:
        app()
    except (ValueError, FileNotFoundError, ArithmeticError, ConnectionError, DeploymentFailedError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
