"""Which files are read: Parquet, JSON-lines and text files, by name, by glob or by folder, on this machine or on an
object store. Files are named here, and not opened: `units.py` reads them."""

from __future__ import annotations

import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper

from raexmc_ray.files import Folder

Kind = Literal["parquet", "json", "text"]
KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".txt": "text",
    ".txt.gz": "text",
}
"""By the end of a file's name. JSON is an object a line; a text file has a text a line."""
GLOB = "*?["
logger = logging.getLogger("raexmc_ray")


@dataclass(frozen=True)
class InputFile:
    """A file to read, as it was when it was listed: its bytes, and when it was last written (ns since the epoch)."""

    file: Folder
    kind: Kind
    size: int
    modified_ns: int

    def __str__(self) -> str:
        return str(self.file)

    @property
    def place(self) -> str:
        """Where it really lies: links may give a file several names."""
        return os.path.realpath(self.file.path) if self.file.is_local else str(self)

    @property
    def is_packed(self) -> bool:
        """Whether it is gzip."""
        return self.file.path.endswith(".gz")


@dataclass(frozen=True)
class Written:
    """What a job writes that may lie among its inputs, and is none: files under its output, by patterns of names."""

    output: Folder
    patterns: tuple[str, ...]

    def has(self, file: InputFile) -> bool:
        root = f"{self.output}/"
        inside = file.place.removeprefix(root)
        return inside != file.place and any(fnmatchcase(inside, pattern) for pattern in self.patterns)


class _Lister(ArrowFSWrapper):
    """Passes over no folder that it cannot list, where the pattern leads there, and no link that leads nowhere: rows
    would be missing in silence. `**` follows a link that leads back up once, not round and round."""

    def glob(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._pattern = path.strip("/").split("/")
        return super().glob(path, *args, **kwargs)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        if "**" in self._pattern and self._comes_round(path):
            return []
        try:
            found = super().ls(path, detail, **kwargs)
        except FileNotFoundError:
            raise
        except OSError as error:  # of which `walk` makes an empty folder
            leading = list(zip(path.strip("/").split("/"), self._pattern, strict=False))
            if any("**" in wanted for _, wanted in leading) or all(fnmatchcase(*pair) for pair in leading):
                raise ValueError(f"{path}: cannot be listed: {error}") from None
            raise
        links = _nowhere(path) if isinstance(self.fs, pafs.LocalFileSystem) else []
        return [*found, *({"name": link, "size": 0, "type": "file"} if detail else link for link in links)]

    def _comes_round(self, path: str) -> bool:
        """Whether the way to a folder of this machine has been through the same one twice."""
        if not isinstance(self.fs, pafs.LocalFileSystem):
            return False
        return [os.path.realpath(above) for above in Path(path).parents].count(os.path.realpath(path)) > 1


def find_inputs(inputs: Sequence[str], written: Written | None = None) -> list[InputFile]:
    """The files that `inputs` name, each once, in the order of their names, whatever the order of `inputs`. A file to
    which links lead, too, has its own name where that is among those found, or else the first of them.

    inputs: paths, `s3://` or `gs://` URLs of files, globs (`*`, `**`, `[…]`; on this machine also `?`) or folders,
    which are searched to their last subfolder, links included, for names that end in one of `KINDS`. Hidden files and
    folders (`.name`, `_name`) are passed over unless they are spelled out, and so is what the caller has `written`.
    Raises ValueError that names the input in which there is nothing to read, a link that leads nowhere, or a name that
    is not UTF-8.
    """
    found: dict[str, list[InputFile]] = defaultdict(list)
    for given in inputs:
        root = _root(given)
        try:
            listed = list(_expand(root))
        except OSError as error:
            raise ValueError(f"{root}: cannot be listed: {error}") from None
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"{root}: cannot be listed: the name {error.object!r} is not UTF-8: rename it") from None
        files = [file for file in listed if not (written and written.has(file))]
        if not files:
            but = f", but for what this job writes to {written.output}" if written and listed else ""
            raise ValueError(f"{root}: there is no file in it that ends in {', '.join(KINDS)}{but}")
        for file in files:
            found[file.place].append(file)
    each = [min(names, key=lambda file: (str(file) != file.place, str(file))) for names in found.values()]
    return sorted(each, key=str)


def _root(given: str) -> Folder:
    """Where an input begins; a link keeps its name, which says what is in the file."""
    if "://" in given:
        return Folder.at(given)
    return Folder(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(given)))


def _expand(root: Folder) -> Iterator[InputFile]:
    info = root.filesystem.get_file_info(root.path)
    if info.type == pafs.FileType.File:
        if kind_of(info.path) is None:
            raise ValueError(f"{root}: expected a file that ends in {', '.join(KINDS)}")
        yield from _readable(root, [info])
    elif info.type == pafs.FileType.Directory:
        yield from _in_folder(root)
    elif any(character in root.path for character in GLOB):
        shown = list(_shown(root, root.filesystem.get_file_info(_Lister(root.filesystem).glob(root.path))))
        for info in shown:
            if info.type == pafs.FileType.Directory:
                yield from _in_folder(Folder(root.filesystem, info.path))
        yield from _of_known_kinds(root, [info for info in shown if info.type != pafs.FileType.Directory])
    else:
        raise ValueError(f"{root}: there is no such file or folder")


def _in_folder(folder: Folder) -> Iterator[InputFile]:
    if folder.is_local:
        shown = _walk(folder)
    else:
        shown = _shown(folder, folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True)))
    files = (pafs.FileType.File, pafs.FileType.NotFound)
    yield from _of_known_kinds(folder, [info for info in shown if info.type in files])


def _walk(root: Folder) -> Iterator[pafs.FileInfo]:
    """What is shown of a folder of this machine and its subfolders, each of them once, however many links lead there,
    or back up: Arrow's own walk goes round and round."""
    done: set[str] = set()
    todo = deque([root.path])
    while todo:
        path = todo.popleft()
        place = os.path.realpath(path)
        if place in done:
            continue
        done.add(place)
        infos = root.filesystem.get_file_info(pafs.FileSelector(path))
        infos += [pafs.FileInfo(link, pafs.FileType.NotFound) for link in _nowhere(path)]
        for info in sorted(_shown(root, infos), key=lambda info: info.path):
            if info.type != pafs.FileType.Directory:
                yield info
            elif os.path.islink(info.path):  # after all that is reached by its own name
                todo.append(info.path)
            else:
                todo.appendleft(info.path)


def _nowhere(path: str) -> list[str]:
    """The links in a folder of this machine that lead nowhere: Arrow does not list them."""
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return [entry.path for entry in entries if entry.is_symlink() and not os.path.exists(entry.path)]


def _of_known_kinds(root: Folder, infos: Sequence[pafs.FileInfo]) -> Iterator[InputFile]:
    files = list(_readable(root, infos))
    if len(files) < len(infos):
        logger.info("%s: passed over %s files of other kinds", root, f"{len(infos) - len(files):,}")
    yield from files


def _shown(root: Folder, infos: Sequence[pafs.FileInfo]) -> Iterator[pafs.FileInfo]:
    """Without those in whose path is a hidden name that `root` does not spell."""
    spelled = set(root.path.split("/"))
    for info in infos:
        if not any(part.startswith((".", "_")) and part not in spelled for part in info.path.split("/")):
            yield info


def _readable(root: Folder, infos: Sequence[pafs.FileInfo]) -> Iterator[InputFile]:
    for info in infos:
        kind = kind_of(info.path)
        if kind:
            file = Folder(root.filesystem, info.path)
            if info.type == pafs.FileType.NotFound:
                raise ValueError(f"{file}: is a link that leads nowhere: mend it, or remove it")
            yield InputFile(file, kind, info.size, modified_ns(info, file))


def modified_ns(info: pafs.FileInfo, file: Folder) -> int:
    """When a file was last written. Of an object store in whole seconds: some list milliseconds of a file, and tell
    seconds of it alone."""
    return int(info.mtime_ns) if file.is_local else int(info.mtime_ns) // 10**9 * 10**9


def kind_of(path: str) -> Kind | None:
    """What a file of this name is read as; None where it is not."""
    return next((kind for suffix, kind in KINDS.items() if path.endswith(suffix)), None)
