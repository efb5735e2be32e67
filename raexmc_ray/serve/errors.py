"""What can go wrong with a request, and is said to its caller; and with a deployment."""

from __future__ import annotations

from collections.abc import Sequence


class RequestError(ValueError):
    """The request asks for what it may not ask for."""


class UnknownLabelError(LookupError):
    """There is no label with this uid."""

    def __init__(self, uid: str) -> None:
        super().__init__(f"no label of this memory has the uid {uid!r}")


class MissingShardsError(RuntimeError):
    """Shards did not answer, and the caller wants no partial answer."""

    def __init__(self, shards: Sequence[int]) -> None:
        named = ", ".join(map(str, shards))
        super().__init__(
            f"no answer from shard{'s' if len(shards) > 1 else ''} {named}: try again, or set `allow_partial` for an "
            "answer without"
        )
        self.shards = list(shards)


class DeploymentFailedError(RuntimeError):
    """Serve could not start the application, or not move it; the message is the cause."""
