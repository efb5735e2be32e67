"""What can end a training, and is said to people. Light: the command line imports it before anything runs."""

from __future__ import annotations


class WorkersFailedError(RuntimeError):
    """The workers failed more often than they may be started again; the message has the last failure."""
