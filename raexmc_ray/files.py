"""A folder on any pyarrow filesystem: a local path, or an `s3://` or `gs://` URL."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict

from raexmc_ray.recipe import CREDENTIALS

CHUNK_BYTES = 16 << 20
SCRATCH = "raexmc-scratch-"
"""How the names of temporary folders begin."""


@dataclass(frozen=True)
class Folder:
    """A folder and the filesystem it is on."""

    filesystem: pafs.FileSystem
    path: str

    @classmethod
    def at(cls, url: str | Path) -> Folder:
        """The folder at a path or URL; it need not exist. Raises ValueError for a URL of no filesystem.

        What a URL cannot spell stands for itself: a space, a letter of any script, `[`, `#`, a `%` before no number.
        """
        if "://" in str(url):
            encoded = quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", str(url)), safe="%:/?@!$&'()*+,;=")
            try:
                return cls(*pafs.FileSystem.from_uri(encoded))
            except pa.ArrowInvalid as error:
                said = CREDENTIALS.sub("", str(error))
                raise ValueError(f"{said}: give a path of this machine, or an s3:// or gs:// URL") from None
        return cls(pafs.LocalFileSystem(), str(Path(url).expanduser().resolve()))

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Folder:
        return Folder(self.filesystem, self.path.rpartition("/")[0])

    def size(self) -> int | None:
        """Bytes of the file at this path, or None where there is no file."""
        info = self.filesystem.get_file_info(self.path)
        return info.size if info.type == pafs.FileType.File else None

    def names(self) -> list[str]:
        """Names of the files and folders in this folder, sorted; none where there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        try:
            return sorted(info.base_name for info in self.filesystem.get_file_info(selector))
        except FileNotFoundError:  # Arrow allows for no folder that another process makes while it looks for it
            return []

    def read(self) -> bytes:
        """All bytes of the file at this path. Raises FileNotFoundError."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write(self, data: bytes) -> None:
        """Put `data` at this path in one atomic step: a reader sees the old file or the whole new one."""
        parent, _, name = self.path.rpartition("/")
        if self.filesystem.type_name != "s3":  # there is none there; to mark one costs requests, and rights above it
            self.filesystem.create_dir(parent, recursive=True)
        if not self.is_local:  # an object store shows an object only when it is whole
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=parent)
        try:
            with os.fdopen(handle, "wb") as file:
                with contextlib.suppress(OSError):  # a filesystem without locks: there nothing half-written is removed
                    fcntl.flock(file, fcntl.LOCK_EX)  # for `remove_half_written`
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(Path(parent))

    def copy_from(self, source: Folder) -> None:
        """Put what the file at `source` has at this path of an object store, in pieces, which come through this
        process: an object shows only when it is whole."""
        with (
            source.filesystem.open_input_stream(source.path) as read,
            self.filesystem.open_output_stream(self.path) as written,
        ):
            while chunk := read.read(CHUNK_BYTES):
                written.write(chunk)

    def upload(self, local: Path) -> None:
        """Copy the files of a local folder to this path."""
        if self.filesystem.type_name != "s3":
            self.filesystem.create_dir(self.path, recursive=True)
        source = pafs.LocalFileSystem()
        pafs.copy_files(str(local), self.path, source_filesystem=source, destination_filesystem=self.filesystem)

    @contextlib.contextmanager
    def filling(self) -> Iterator[Path]:
        """A local folder to write files into, which are at this path once it is left, and stay there though the power
        fail. Where the path is local each of them appears whole, in one step: what another process has made meanwhile
        may be open elsewhere, and is replaced, never written into."""
        if not self.is_local:
            with Scratch() as scratch:
                yield scratch
                self.upload(scratch)
            return
        beside = Path(self.path) / f".filling.{uuid.uuid4().hex[:8]}"
        beside.mkdir(parents=True)
        try:
            yield beside
            for folder, _, names in os.walk(beside):
                target = Path(self.path) / Path(folder).relative_to(beside)
                target.mkdir(exist_ok=True)
                for name in names:
                    sync(Path(folder) / name)
                    os.replace(Path(folder) / name, target / name)
            for folder, inside, _ in os.walk(self.path):
                inside[:] = [name for name in inside if not name.startswith(".")]  # they come and go
                sync(Path(folder))
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @contextlib.contextmanager
    def appearing(self) -> Iterator[Path]:
        """As `filling`, for a folder that is not there: where it is local it appears whole, in one step. Raises
        FileExistsError where another process has made it meanwhile: what is there is not touched."""
        if not self.is_local:
            with self.filling() as local:
                yield local
            return
        beside = self.parent / f".{self.name}.{uuid.uuid4().hex[:8]}"
        Path(beside.path).mkdir(parents=True)
        try:
            yield Path(beside.path)
            for folder, _, names in os.walk(beside.path):
                for path in (*(Path(folder) / name for name in names), Path(folder)):
                    sync(path)
            try:
                os.rename(beside.path, self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise FileExistsError(f"{self}: another process has made it meanwhile") from None
            sync(Path(self.parent.path))
        finally:
            beside.remove()

    def remove_left(self) -> None:
        """Remove from this folder what `filling` and `appearing` left there where their process was killed."""
        for name in self.names():
            if name.startswith("."):
                (self / name).remove()

    def remove_half_written(self, prefix: str) -> None:
        """Remove from this folder what `write` left there, of names that begin with `prefix`, where its process was
        killed; not what another process is writing now."""
        for name in self.names():
            if name.startswith(f".{prefix}"):
                _remove_unless_held(Path(self.path) / name)  # an object store has none

    def remove(self) -> None:
        """Remove this folder with all that is in it; nothing where there is none."""
        if self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)

    def remove_file(self) -> None:
        """Remove the file at this path; nothing where there is none."""
        if self.size() is not None:
            self.filesystem.delete_file(self.path)

    def local(self, cache: Path) -> Path:
        """A local path with this file's or folder's content: itself, or a copy under `cache`."""
        if self.is_local:
            return Path(self.path)
        target = cache / self.name
        if self.size() is None:
            target.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(self.path, str(target), source_filesystem=self.filesystem)
        return target

    def sha256(self) -> str:
        """Of the file's bytes, read in chunks."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


class Scratch:
    """A temporary folder that ends with its process: a context manager, or for as long as the object is there.

    No process cleans up after `kill -9`, which is how Ray ends actors: what it leaves, the next process here that makes
    a folder removes. A lock tells whose process is alive: the kernel takes it back whatever ends its holder.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
            _remove_unless_held(left)
        # Under another name until it is locked, so that nobody takes it for one that was left.
        new = Path(tempfile.mkdtemp(prefix=f".{SCRATCH}"))
        lock = os.open(new, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = new.rename(new.with_name(new.name.removeprefix(".")))
        self._end = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._end()


def _remove_unless_held(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is held, another user's, or gone by now
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def sync(path: Path) -> None:
    """Wait until this file, or this folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class FileEntry(BaseModel):
    """What a file must be: its bytes, and the sha256 over them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


def describe_file(path: Path) -> FileEntry:
    """What a local file is, for a manifest."""
    return FileEntry(size=path.stat().st_size, sha256=Folder.at(path).sha256())


def describe_bytes(content: bytes) -> FileEntry:
    """What a file with this content is."""
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
