"""Run a command, and leave no process of its behind: not after Ctrl-C, not after a crash. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 8.0
"""How long the command may take to end by itself after Ctrl-C."""


def run_and_clean_up(command: Sequence[str]) -> int:
    """Run `command` to its end; returns its exit status, 130 after Ctrl-C or SIGTERM.

    The command runs in a session of its own, so that Ctrl-C reaches this process alone, which passes it on. Its
    orphans become our children (PR_SET_CHILD_SUBREAPER), so that all of them are found, and ended by their ids.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        status: int | None = None
        while status is None and not interrupted:
            status = _wait(child, 0.2)
        if status is None:
            sys.stderr.write("\nstopping; run the same command again to go on\n")
            child.send_signal(signal.SIGINT)
            status = _wait(child, GRACE_S)
        _end_descendants()
        child.wait()
        return 130 if interrupted else int(status or 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end_descendants() -> None:
    """SIGTERM, then SIGKILL, to every process that descends from this one, until there is none."""
    me = psutil.Process(os.getpid())
    for end, seconds in (
        (psutil.Process.terminate, 3.0),
        (psutil.Process.kill, 3.0),
        (psutil.Process.kill, 3.0),
    ):
        processes = me.children(recursive=True)
        for process in processes:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=seconds)
        if not me.children(recursive=True):
            return
