"""Extreme multi-label text classification on Ray: which of these millions of labels fit this text?

    memory = raexmc_ray.open("runs/demo/memory")
    memory.predict(["vim-gtk3: Vi IMproved - enhanced vi editor"], k=10)

`open` and `build` work in one process, without a cluster. See README.md for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raexmc_ray.local import Memory
    from raexmc_ray.local import open_memory as open
    from raexmc_ray.memory.write import build_memory as build

__version__ = "0.1.0"
__all__ = ["Memory", "build", "open"]

_HOMES = {
    "Memory": ("raexmc_ray.local", "Memory"),
    "open": ("raexmc_ray.local", "open_memory"),
    "build": ("raexmc_ray.memory.write", "build_memory"),
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import raexmc_ray` and `raexmc --help` do not wait for torch and FAISS."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
