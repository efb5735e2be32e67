"""What answers at the URL and is not the application is said to be that, with what it said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from raexmc_ray.client import ApiError, Client, UnreachableError

PAGE = b"<html>a proxy's own page</html>"


class Other(BaseHTTPRequestHandler):
    """Of another server: a page for everything, broken gzip for the memory."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/v1/memory":
            self.send_header("content-encoding", "gzip")
        self.send_header("content-length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def other() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_page_in_the_place_of_an_answer_is_an_api_error(other: str) -> None:
    with Client(other) as client, pytest.raises(ApiError, match=r"200 .*a proxy's own page"):
        client.labels("v")


def test_an_answer_that_cannot_be_read_is_unreachable(other: str) -> None:
    with Client(other) as client, pytest.raises(UnreachableError, match=other):
        client.memory()
