"""Commands about a memory: inspect, plan."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from raexmc_ray.cli.output import console, say_bytes
from raexmc_ray.recipe import Recipe


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
    table = Table("", Column(overflow="fold"), title=str(folder), show_header=False, title_justify="left")
    total = sum(entry.size for entry in manifest.files.values())
    sizes = [f"{part} {say_bytes(size)}" for part, size in manifest.bytes_by_part().items()]
    lists = f", {manifest.index.probes} of {manifest.index.lists:,} lists probed" if manifest.index.lists else ""
    others = [name for name in snapshot.list_snapshots(folder) if name != manifest.id]
    for name, value in (
        ("snapshot", f"{manifest.id} (current), made {manifest.created}"),
        ("others", ", ".join(others) or "none"),
        ("keys", f"{manifest.keys:,}: {manifest.instances:,} instances and {manifest.labels:,} labels"),
        ("shards", f"{manifest.shards}, {manifest.index.kind} index{lists}, dimension {manifest.dimension}"),
        ("size", f"{say_bytes(total)} in {len(manifest.files)} files: {', '.join(sizes)}"),
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


def plan(
    instances: Annotated[int, typer.Option(min=0, help="Training instances.")],
    labels: Annotated[int, typer.Option(min=1, help="Labels.")],
    dimension: Annotated[int, typer.Option(min=1, help="Numbers in a key, those of a lexical part included.")] = 768,
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
        Recipe.parse({"corpus": {"path": "any"}, "memory": {"index": index}}, source="--index").memory,
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
    in_all = planned.shards * planned.shard_memory
    unknown = f"no estimate for {spec.kind}: build a part of it, and measure"
    for name, value in (
        ("keys", f"{planned.keys:,} of {dimension} numbers, {spec.kind} index{lists}"),
        ("shards", f"{planned.shards} (memory.shards), {planned.shards // machines} a machine"),
        (
            "memory",
            f"{say_bytes(planned.shard_memory)} a shard, {say_bytes(in_all)} in all",
        ),
        ("disk", f"{say_bytes(planned.shard_disk)} a shard, {say_bytes(planned.shards * planned.shard_disk)} in all"),
        ("beside it", f"{say_bytes(planned.embeddings_disk)} of embeddings, which may go once it is built"),
        ("training", f"{say_bytes(planned.training_memory)} of memory, once, before any shard is built"),
        ("building", f"{say_bytes(planned.build_memory)} of memory for each shard that is built at a time"),
        ("to embed", f"{planned.embed_hours:.2f} hours at {texts_per_second:,.0f} texts/s a machine"),
        ("to build", unknown if planned.build_hours is None else f"{planned.build_hours:.2f} hours"),
    ):
        table.add_row(name, value)
    console.print(table)
