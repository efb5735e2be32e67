"""The application on this machine, for as long as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.serve.config import HTTPOptions

from raexmc_ray.serve.app import build_app
from raexmc_ray.serve.schema import ServeSettings

APPLICATION = "raexmc"


@contextmanager
def serving(memory: str, port: int = 8000) -> Iterator[str]:
    """Serve a memory on 127.0.0.1 over the connected cluster; gives the URL once it answers."""
    app = build_app(ServeSettings(memory=memory))
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        serve.run(app, name=APPLICATION, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's
