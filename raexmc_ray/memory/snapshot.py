"""The memory on disk: immutable snapshots, published by one atomic step.

    MEMORY/
      CURRENT                    one line: the id of the current snapshot, replaced atomically
      snapshots/ID/
        manifest.json            what is in it, with size and sha256 of every file, and its own; written last
        encoder/                 safetensors, tokenizer, config
        labels.parquet           index, uid, text
        segments/0000/
          trained.faiss          what all shards share: the coarse quantiser and codebooks
          shard-0000/
            index.faiss          embeddings
            vectors.npy          of `ivf-pq`: float16 embeddings to rescore with, as they lie in the inverted lists
            positions.npy        of `ivf-pq`: their places among the shard's keys
            keys.arrow           key_id, kind, uid, text, labels (those that the key votes for)
      building/ID/               what a build that was stopped finds again; removed when the snapshot is published

Keys are an Arrow file, not Parquet: it is opened by memory map in no time, and read where it is asked.
A snapshot is a list of segments; a build makes one. Readers refuse what is torn, altered, foreign or too new,
naming the file. Nothing in a snapshot is code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from raexmc_ray.files import FileEntry, Folder, Scratch
from raexmc_ray.memory.index import CoarseQuantizer, open_quantizer
from raexmc_ray.memory.kinds import IndexSpec
from raexmc_ray.recipe import PredictionSection

if TYPE_CHECKING:
    from raexmc_ray.encoder import TextEncoder

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
LABELS = "labels.parquet"
ENCODER = "encoder"
TRAINED = "trained.faiss"
SEAL = "sha256"
"""In a manifest: over all the rest of it."""
logger = logging.getLogger("raexmc_ray")
ALTERED = "{}: its sha256 is not the manifest's: it was altered. Remove it, and run `raexmc build` again"


class SnapshotError(ValueError):
    """A memory that cannot be read: names the file, and what is wrong with it."""


class NewerSnapshotError(SnapshotError):
    """A snapshot of a newer version of this package: there is nothing wrong with it."""


class Manifest(BaseModel):
    """What is in a snapshot."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    format_version: int = FORMAT_VERSION
    id: str
    created: str
    """UTC, ISO 8601."""
    instances: int
    labels: int
    dimension: int
    """Numbers in a key."""
    shards: int
    index: IndexSpec
    """Kind of index, with its sizes."""
    segments: list[str]
    """Names of the segments, in the order in which they were added."""
    encoder_fingerprint: str
    defaults: PredictionSection
    """λ, temperature, neighbours and k where a call does not give them."""
    recipe: dict[str, object] | None = None
    """The recipe that the memory was built from; without `training` where its encoder came from elsewhere."""
    files: dict[str, FileEntry]
    """Every file of the snapshot but this one."""

    @property
    def keys(self) -> int:
        return self.instances + self.labels

    @property
    def shard_memory(self) -> int:
        """Bytes that the process of the largest shard maps: its index, and what it rescores with."""
        sizes: Counter[Path] = Counter()
        for name, entry in self.files.items():
            if Path(name).name in self.index.files:
                sizes[Path(name).parent] += entry.size
        return max(sizes.values())

    def bytes_by_part(self) -> dict[str, int]:
        """{index, vectors, positions, keys, trained, labels, encoder: bytes}, of those there are, the largest first."""
        sizes: Counter[str] = Counter()
        for name, entry in self.files.items():
            sizes[ENCODER if name.startswith(f"{ENCODER}/") else Path(name).stem] += entry.size
        return dict(sizes.most_common())


@dataclass(frozen=True)
class Snapshot:
    """A published snapshot: its manifest was read, its files are checked as they are asked for."""

    folder: Folder
    manifest: Manifest
    _copies: list[Scratch] = field(default_factory=list, compare=False, repr=False)
    """Of the files of a remote one. They go with this object: who has mapped one keeps what is in it."""

    def file(self, name: str, verify: bool = True) -> Path:
        """A local path of the file, whose size, and with `verify` whose checksum, is as the manifest says."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise SnapshotError(f"{self.folder / name}: the manifest does not list this file")
        file = self.folder / name
        check_file(file, entry, verify and file.is_local)
        path = file.local(self._place_for(name))
        if verify and not file.is_local and Folder.at(path).sha256() != entry.sha256:  # read once, not twice
            raise SnapshotError(ALTERED.format(file))
        return path

    def encoder_folder(self) -> Path:
        """A local path of the encoder's folder, every file of it verified."""
        names = [name for name in self.manifest.files if name.startswith(f"{ENCODER}/")]
        if not names:
            raise SnapshotError(f"{self.folder / ENCODER}: the manifest lists no encoder")
        paths = [self.file(name) for name in names]
        return paths[0].parent

    def encoder(self) -> TextEncoder:
        """The encoder that made the keys. Raises SnapshotError where it is another."""
        from raexmc_ray.encoder import TextEncoder  # seconds of imports, for which no shard must wait

        encoder = TextEncoder.load(str(self.encoder_folder()))
        if encoder.fingerprint != self.manifest.encoder_fingerprint:
            raise SnapshotError(
                f"{self.folder / ENCODER}: this encoder (fingerprint {encoder.fingerprint[:12]}) is not the one "
                f"that made the keys ({self.manifest.encoder_fingerprint[:12]}): build the memory again"
            )
        return encoder

    def quantizer(self, verify: bool = True) -> CoarseQuantizer | None:
        """What says which inverted lists a query looks into; None where the index has none."""
        if not self.manifest.index.lists:
            return None
        return open_quantizer(self.file(f"segments/{self.manifest.segments[0]}/{TRAINED}", verify), self.manifest.index)

    def _place_for(self, name: str) -> Path:
        if self.folder.is_local:
            return Path(self.folder.path)
        if not self._copies:
            self._copies.append(Scratch())
        parent = self._copies[0].path / Path(name).parent
        parent.mkdir(parents=True, exist_ok=True)
        return parent


def shard_file(segment: str, shard: int, name: str) -> str:
    """The name, within a snapshot, of a shard's file."""
    return f"segments/{segment}/shard-{shard:04d}/{name}"


def check_file(file: Folder, entry: FileEntry, verify: bool = True) -> None:
    """Raise SnapshotError unless `file` has the size and, with `verify`, the checksum of `entry`."""
    size = file.size()
    if size is None:
        raise SnapshotError(f"{file}: is missing; the manifest lists it: run `raexmc build` again")
    if size != entry.size:
        raise SnapshotError(
            f"{file}: has {size:,} bytes, the manifest says {entry.size:,}: it is torn: run `raexmc build` again"
        )
    if verify and file.sha256() != entry.sha256:
        raise SnapshotError(ALTERED.format(file))


def check_sizes(snapshot: Snapshot) -> None:
    """Raise SnapshotError, which names the file, unless every file of a snapshot is there with all its bytes."""
    for name, entry in snapshot.manifest.files.items():
        check_file(snapshot.folder / name, entry, verify=False)


def verify(snapshot: Snapshot) -> Iterator[int]:
    """Read every byte of a snapshot against its checksum; gives the bytes of each file as it is found whole.

    Raises SnapshotError, which names the first file that is not.
    """
    for name, entry in snapshot.manifest.files.items():
        check_file(snapshot.folder / name, entry)
        yield entry.size


def list_snapshots(memory: Folder) -> list[str]:
    """Ids of the snapshots of a memory that were written to their end, sorted."""
    return [name for name in (memory / "snapshots").names() if is_complete(memory, name)]


def publish(memory: Folder, manifest: Manifest) -> None:
    """Make a snapshot, all of whose files are written, the current one."""
    content = manifest.model_dump(mode="json", by_alias=True)
    text = json.dumps({**content, SEAL: seal_of(content)}, indent=2)
    (memory / "snapshots" / manifest.id / MANIFEST).write(text.encode() + b"\n")
    publish_current(memory, manifest.id)


def seal_of(content: dict[str, Any]) -> str:
    """sha256 over the content of a manifest, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish_current(memory: Folder, snapshot: str) -> None:
    """Make a complete snapshot the current one."""
    (memory / "CURRENT").write(f"{snapshot}\n".encode())


def publish_again(memory: Folder, snapshot: str) -> bool:
    """Make a snapshot the current one where an earlier run finished it; whether it was there.

    One that is damaged is none: no reader opens it, so it is taken away, to be made anew. Who has its files mapped
    keeps what is in them. Raises NewerSnapshotError.
    """
    if not is_complete(memory, snapshot):
        return False
    try:
        check_sizes(open_snapshot(memory, snapshot))
    except NewerSnapshotError:
        raise
    except SnapshotError as error:
        logger.warning("%s. It is made anew", error)
        (memory / "snapshots" / snapshot).remove()
        return False
    publish_current(memory, snapshot)
    return True


def is_complete(memory: Folder, snapshot: str) -> bool:
    """Whether this snapshot was written to its end."""
    return (memory / "snapshots" / snapshot / MANIFEST).size() is not None


def open_snapshot(memory: str | Path | Folder, snapshot: str | None = None) -> Snapshot:
    """The current snapshot of a memory, or the one named. Raises FileNotFoundError and SnapshotError."""
    memory = memory if isinstance(memory, Folder) else Folder.at(memory)
    current = memory / "CURRENT"
    if snapshot is None:
        if current.size() is None:
            raise FileNotFoundError(
                f"no memory at {memory}: there is no CURRENT in it. Build one with `raexmc build`, or `make demo`"
            )
        snapshot = current.read().decode("utf-8", "replace").strip()
    if not snapshot or "/" in snapshot or snapshot.startswith("."):
        raise SnapshotError(f"{current}: {snapshot!r} is not the id of a snapshot")
    folder = memory / "snapshots" / snapshot
    return Snapshot(folder, _read_manifest(folder / MANIFEST, snapshot))


def _read_manifest(file: Folder, snapshot: str) -> Manifest:
    if file.size() is None:
        raise SnapshotError(f"{file}: is missing: the snapshot {snapshot} was never finished, or was removed")
    try:
        content = json.loads(file.read())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{file}: is torn or not a manifest ({error}): run `raexmc build` again") from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerSnapshotError(
            f"{file}: has format version {version}; this raexmc_ray reads version {FORMAT_VERSION}: update it"
        )
    if version != FORMAT_VERSION:
        raise SnapshotError(
            f"{file}: has format version {version}; this raexmc_ray reads version {FORMAT_VERSION}: run `raexmc build` "
            "again"
        )
    if content.pop(SEAL, None) != seal_of(content):
        raise SnapshotError(f"{file}: its sha256 is not what it says: it was altered: run `raexmc build` again")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SnapshotError(f"{file}: {where}: {problem['msg']}") from None
    if manifest.id != snapshot:
        raise SnapshotError(f"{file}: is the manifest of {manifest.id}, not of {snapshot}")
    return manifest


def memory_id(
    corpus_fingerprint: str, encoder_fingerprint: str, shards: int, index: IndexSpec, defaults: PredictionSection
) -> str:
    """The id of the snapshot that follows from what it is made of: the same inputs make the same snapshot. Of another
    format it is another one: a build that an earlier version began is not gone on with."""
    parts = [str(FORMAT_VERSION), corpus_fingerprint, encoder_fingerprint, str(shards), index.model_dump_json()]
    parts.append(defaults.model_dump_json(by_alias=True))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
