"""Ctrl-C ends every process that a run started, orphans and those that ignore it included; of a killed process's
temporary files the next one leaves none. Nor does another run touch its processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, free_port, tiny_settings

from raexmc_ray.files import Folder, Scratch

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1] + '.orphan', 'w').write(str(os.getpid())); time.sleep(600)
    os._exit(0)
open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)
"""

HOLD = """
import sys, time
from pathlib import Path
from raexmc_ray.files import Scratch
with Scratch() as folder:
    (folder / "sub").mkdir()
    (folder / "sub/copy").write_bytes(b"x" * 1000)
    Path(sys.argv[1] + ".").write_text(str(folder))
    Path(sys.argv[1] + ".").rename(sys.argv[1])
    time.sleep(600)
"""

WRITE = """
import os, sys, time
from pathlib import Path
from raexmc_ray.files import Folder
wait = os.fsync
def fsync(file):
    Path(sys.argv[2] + ".here").touch()
    while not Path(sys.argv[2] + ".go").exists():
        time.sleep(0.01)
    wait(file)
os.fsync = fsync
(Folder.at(sys.argv[1]) / sys.argv[2]).write(b"whole")
"""

BESIDE = """
import subprocess, sys
import ray
from raexmc_ray.cluster import connected

ANOTHER = '''
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
cluster = Cluster(initialize_head=True, head_node_args=head)
print("up", flush=True)
sys.stdin.read()
cluster.shutdown()
'''

@ray.remote(num_cpus=0)
class Actor:
    def id(self):
        return ray.get_runtime_context().get_actor_id()

@ray.remote(num_cpus=0)
def is_taken_for_dead(actor):  # as Ray Train's cleaner of placement groups asks
    from ray.train.v2._internal.state.util import is_actor_alive
    from ray.util.state.exception import RayStateApiException

    try:
        return not is_actor_alive(actor, 5)
    except RayStateApiException:
        return False

with connected():
    actor = Actor.remote()
    name = ray.get(actor.id.remote())
    pipe = subprocess.PIPE
    another = subprocess.Popen([sys.executable, "-c", ANOTHER, sys.argv[1]], stdin=pipe, stdout=pipe, text=True)
    assert another.stdout.readline() == "up\\n"
    print(ray.get(is_taken_for_dead.remote(name)))
    another.stdin.close()
    another.wait()
"""

SUPERVISE = "import sys; from raexmc_ray.supervise import run_and_clean_up; sys.exit(run_and_clean_up({command}))"


def _wait_for(path: Path, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.faults
def test_what_a_killed_process_copied_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    said = [tmp_path / "first", tmp_path / "second"]
    holders = [subprocess.Popen([sys.executable, "-c", HOLD, str(path)], env=environment) for path in said]
    try:
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in said):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first, second = (Path(path.read_text()) for path in said)
        holders[0].kill()
        holders[0].wait()
        assert (first / "sub/copy").exists(), "nobody could clean up"
        with Scratch() as mine:
            assert not first.exists()
            assert (second / "sub/copy").exists(), "its process is alive"
            assert sorted(tmp_path.glob("*raexmc*")) == sorted([mine, second])
        assert not mine.exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


@pytest.mark.faults
def test_half_a_file_is_removed_of_who_was_killed_only(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    command = [sys.executable, "-c", WRITE, str(folder)]
    writers = {name: subprocess.Popen([*command, name], cwd=tmp_path) for name in ("part-0", "part-1", "other")}
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.here"))) < len(writers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for name in ("part-1", "other"):
            writers[name].kill()
            writers[name].wait()
        Folder.at(folder).remove_half_written("part-")
        assert sorted(path.name[:7] for path in folder.iterdir()) == [".other.", ".part-0"]
        (tmp_path / "part-0.go").touch()
        assert writers["part-0"].wait(60) == 0
        assert (folder / "part-0").read_bytes() == b"whole"
    finally:
        for writer in writers.values():
            writer.kill()
            writer.wait()


@pytest.mark.faults
def test_a_stubborn_child_and_its_orphan_are_ended(tmp_path: Path) -> None:
    script = SUPERVISE.format(command=[sys.executable, "-c", STUBBORN, str(tmp_path / "pid")])
    supervisor = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    pids = [_wait_for(tmp_path / "pid"), _wait_for(tmp_path / "pid.orphan")]
    os.killpg(supervisor.pid, signal.SIGINT)
    assert supervisor.wait(40) == 130
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_status_is_the_commands() -> None:
    script = SUPERVISE.format(command=[sys.executable, "-c", "import sys; sys.exit(7)"])
    assert subprocess.run([sys.executable, "-c", script]).returncode == 7


def _overrides(corpus: Path, storage: Path) -> list[str]:
    settings = tiny_settings(corpus, storage)
    return [f"{s}.{f}={v}" for s, fields in settings.items() for f, v in fields.items() if not isinstance(v, dict)]


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_the_demo_killed_at_a_random_moment_leaves_nothing_and_runs_again(tiny_corpus: Path, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    command = [sys.executable, str(ROOT / "examples/demo.py"), *_overrides(tiny_corpus, storage)]
    mark = f"cluster.storage={storage}"
    for moment in (random.uniform(3, 12), random.uniform(12, 35)):
        demo = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        family = psutil.Process(demo.pid).children(recursive=True)
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(60) == 130
        left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"killed after {moment:.1f} s, these are left: {left}"
        assert not [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for printed in ("labels only", "instances only", "both", "popularity", "cosine", "Done"):
        assert printed in done.stdout


@pytest.mark.faults
def test_another_cluster_of_the_machine_is_not_asked_who_is_alive() -> None:
    """One that was started as by `ray start`, which knows none of our actors: Ray Train would end its own workers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    command = [sys.executable, "-c", BESIDE, str(free_port())]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.stdout.splitlines()[-1:] == ["False"], run.stdout + run.stderr
