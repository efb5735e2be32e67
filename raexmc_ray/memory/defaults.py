"""A snapshot with other defaults: the same immutable files under a new id."""

from __future__ import annotations

import os
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raexmc_ray.files import FileEntry, Folder, sync
from raexmc_ray.memory.snapshot import Snapshot, check_file, memory_id, publish, publish_again
from raexmc_ray.recipe import PredictionSection

STORE_COPIES_BYTES = 5 << 30
"""The largest object that S3 copies by itself in one request."""


def with_defaults(memory: Folder, snapshot: Snapshot, corpus_fingerprint: str, defaults: PredictionSection) -> str:
    """Publish `snapshot` of a memory with other defaults as the current one; returns the new snapshot's id.

    Files are hard links on a local disk (copies where it knows none). An object store copies them itself; those larger
    than it copies come through this process. They are put there one by one and whole, the manifest after them, and
    CURRENT last: until then nothing has changed, and run again it goes on. The id is what `raexmc build` gives for the
    same corpus, encoder, index and settings.
    """
    manifest = snapshot.manifest
    name = memory_id(corpus_fingerprint, manifest.encoder_fingerprint, manifest.shards, manifest.index, defaults)
    if publish_again(memory, name):
        return name
    target = memory / "snapshots" / name
    for path, entry in manifest.files.items():
        check_file(snapshot.folder / path, entry, verify=False)
        _share(snapshot.folder / path, target / path, entry)
        check_file(target / path, entry, verify=False)
    recipe: dict[str, Any] | None = manifest.recipe
    if recipe is not None:
        recipe = {**recipe, "prediction": defaults.model_dump(mode="json", by_alias=True)}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    publish(
        memory, manifest.model_copy(update={"id": name, "created": created, "defaults": defaults, "recipe": recipe})
    )
    return name


def _share(source: Folder, target: Folder, entry: FileEntry) -> None:
    """Put the file at `source`, which is `entry`, at `target`, too, in one atomic step."""
    if not source.is_local:
        if entry.size <= STORE_COPIES_BYTES:
            source.filesystem.copy_file(source.path, target.path)  # no byte passes through here
        else:
            target.copy_from(source)
        return
    path = Path(target.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: the same command may run twice at once, and none may take the other's away.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            os.link(source.path, beside)
        except OSError:  # a filesystem without hard links
            shutil.copyfile(source.path, beside)
            sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # left by `replace` where both names are links to the same file
