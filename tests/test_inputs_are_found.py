"""Input files are found by name, glob or folder, each once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.local import LocalFileSystem

from raexmc_ray.files import Folder
from raexmc_ray.inputs.find import Written, _expand, find_inputs, modified_ns


def test_files_are_found_by_name_glob_and_folder_in_any_order(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "sub/c.parquet", "sub/deep/d.txt.gz", "sub/_hidden/e.txt", "sub/.f.txt", "g.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub/predictions").mkdir()
    (tmp_path / "sub/predictions/part.parquet").write_bytes(b"")

    def names(*inputs: str, output: str | None = None) -> list[str]:
        written = Written(Folder.at(tmp_path / output), ("predictions/part*",)) if output else None
        found = find_inputs([str(tmp_path / given) for given in inputs], written)
        return [str(Path(str(file)).relative_to(tmp_path)) for file in found]

    everything = ["a.txt", "b.jsonl", "sub/c.parquet", "sub/deep/d.txt.gz", "sub/predictions/part.parquet"]
    assert names(".") == everything
    assert names("sub", "b.jsonl", "a.txt", ".") == everything
    assert names(".", output="sub") == everything[:-1], "but for what is written there"
    assert names(".", output=".") == everything, "and of that name only"
    (tmp_path / "to_sub").symlink_to(tmp_path / "sub")
    assert names("to_sub", output="to_sub") == ["to_sub/c.parquet", "to_sub/deep/d.txt.gz"]
    (tmp_path / "to_sub").unlink()
    assert names("*.txt") == ["a.txt"]
    assert names("[ab].*") == ["a.txt", "b.jsonl"]
    assert names("**/*.txt*") == ["a.txt", "sub/deep/d.txt.gz"]
    assert names("su*") == everything[2:]
    (tmp_path / "link.txt").symlink_to(tmp_path / "g.csv")
    assert names("link.txt") == ["link.txt"]
    assert names("sub/_hidden/e.txt") == names("su*/_hidden/*") == ["sub/_hidden/e.txt"]
    for wrong, says in (
        ("none.txt", "no such file or folder"),
        ("g.csv", "expected a file that ends in"),
        ("*.csv", "there is no file in it that ends in"),
        ("s*/_hidden/*.json", "there is no file in it that ends in"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            names(wrong)
        assert wrong.split("/")[-1] in str(error.value)


def test_a_file_to_which_several_links_lead_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in/real").mkdir(parents=True)
    (tmp_path / "away/deep").mkdir(parents=True)
    for name in ("in/real/a.txt", "away/b.txt", "away/deep/c.txt"):
        (tmp_path / name).write_text("vim\n")
    for link, to in (
        ("in/a_link", "real"),  # before its own place in the order of names
        ("in/real/up", "../.."),  # back to what it is in, by two ways: without an end
        ("in/real/round", ".."),
        ("in/_hidden", "../away"),  # passed over, and with it no other way to what it leads to
        ("in/z", "../away"),
        ("in/y.txt", "real/a.txt"),
    ):
        (tmp_path / link).symlink_to(to)

    def names(*inputs: str) -> list[str]:
        return [str(Path(str(file)).relative_to(tmp_path)) for file in find_inputs([str(tmp_path / i) for i in inputs])]

    for inputs in (["in"], ["in", "in/a_link", "in/z"], ["in/z/deep", "in"], ["in/*"], ["in/real", "in"]):
        assert sorted(Path(name).name for name in names(*inputs)) == ["a.txt", "b.txt", "c.txt"]
        assert "in/real/a.txt" in names(*inputs), "its own name"
    assert names("in/a_link/a.txt", "in/y.txt") == ["in/a_link/a.txt"], "the first of its names"
    assert names("in/z", "away") == names("away", "in/z") == ["away/b.txt", "away/deep/c.txt"]


@pytest.mark.timeout(60)
def test_a_glob_ends_where_links_lead_back_up(tmp_path: Path) -> None:
    (tmp_path / "in/real").mkdir(parents=True)
    (tmp_path / "in/real/a.txt").write_text("vim\n")
    for link in "bcd":
        (tmp_path / "in/real" / link).symlink_to("..")
    assert [str(file) for file in find_inputs([f"{tmp_path}/in/**/*.txt"])] == [f"{tmp_path}/in/real/a.txt"]
    spelled = f"{tmp_path}/in/real/b/real/a.txt"
    assert [str(file) for file in find_inputs([f"{tmp_path}/in/**/b/real/*.txt"])] == [spelled]


def test_an_object_stores_times_are_whole_seconds(tmp_path: Path) -> None:
    """MinIO lists milliseconds, and tells seconds of a file alone: the same file would have changed."""
    (tmp_path / "a.txt").write_text("one")
    os.utime(tmp_path / "a.txt", ns=(0, 1_234_567_890_123_000_000))
    there = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # one that is not "this machine's"
    assert modified_ns(there.get_file_info("a.txt"), Folder(there, "a.txt")) == 1_234_567_890_000_000_000
    (here,) = find_inputs([str(tmp_path)])
    assert here.modified_ns == 1_234_567_890_123_000_000


def test_a_folder_that_cannot_be_listed_is_not_passed_over_by_a_glob(tmp_path: Path) -> None:
    class Shut(LocalFileSystem):
        def find(self, path: str, *args: Any, **kwargs: Any) -> Any:  # by which pyarrow lists
            if path.endswith("part=2"):
                raise PermissionError(f"Access Denied: {path}")
            return super().find(path, *args, **kwargs)

    for part in ("part=1", "part=2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text("vim\n")
    there = pafs.PyFileSystem(pafs.FSSpecHandler(Shut()))
    for pattern in ("part=*/*.txt", "**/*.txt", "*=2/a.*"):
        with pytest.raises(ValueError, match=r"part=2: cannot be listed: .*Access Denied"):
            list(_expand(Folder(there, f"{tmp_path}/{pattern}")))
    (found,) = _expand(Folder(there, f"{tmp_path}/*=1/*.txt"))  # the pattern does not lead there
    assert found.file.name == "a.txt"


@pytest.mark.parametrize("given", ["in", "in/*", "in/**/*.txt", "in/sub", "i*"])
def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path: Path, given: str) -> None:
    """Its rows would be missing in silence."""
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/a.txt").write_text("vim\n")
    for link in ("in/.b.txt", "in/sub/_c.txt", "in/sub/d.csv"):  # which nobody reads
        (tmp_path / link).symlink_to("gone.txt")
    assert [str(file) for file in find_inputs([f"{tmp_path}/{given}"])] == [f"{tmp_path}/in/sub/a.txt"]
    (tmp_path / "in/sub/e.txt").symlink_to("gone.txt")
    with pytest.raises(ValueError, match=r"/in/sub/e\.txt: is a link that leads nowhere"):
        find_inputs([f"{tmp_path}/{given}"])


@pytest.mark.parametrize("given", ["in", "in/*.txt", "**/*.txt", os.fsdecode(b"in/caf\xe9.txt")])
def test_a_name_that_is_not_utf8_is_told_with_the_remedy(tmp_path: Path, given: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("vim\n")
    (tmp_path / os.fsdecode(b"in/caf\xe9.txt")).write_text("emacs\n")
    with pytest.raises(ValueError, match=rf"/{re.escape(given)}: cannot be listed: .*/caf\\\w+\.txt'.*: rename it"):
        find_inputs([f"{tmp_path}/{given}"])
