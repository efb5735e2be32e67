"""Entries of the logs, one for each request and one for each batch, in the encoding of Serve's `logging_config`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from ray._common.formatters import JSONFormatter

SERVE = logging.getLogger("ray.serve")
"""Has Serve's handlers, which write what is logged below it."""


def write(log: logging.Logger, what: str, entry: Mapping[str, Any]) -> None:
    """Write an entry: where Serve logs JSON its fields are fields of the line beside Serve's own, else the line's text
    is a JSON object. what: the line's text where the fields are not."""
    if any(_is_json(handler) for handler in SERVE.handlers):
        log.info("%s", what, extra=entry)
    else:
        log.info("%s", json.dumps(entry))


def _is_json(handler: logging.Handler) -> bool:
    # Serve has one that gathers lines before the file's.
    return isinstance(getattr(handler, "target", handler).formatter, JSONFormatter)
