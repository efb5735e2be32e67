"""What a run writes about itself: JSON lines, a picture, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from raexmc_ray.files import Folder

LINES, PICTURE, TENSORBOARD = "curves.jsonl", "curves.png", "tensorboard"


class Curves:
    """The lines of one run, each a mapping with its `step`. The first rank's process writes them."""

    def __init__(self, folder: Folder, step: int) -> None:
        """Goes on after `step`: later lines, of steps that are taken again, are dropped."""
        self._file = folder / LINES
        self._lines = [line for line in read_curves(folder) if line["step"] <= step]
        self._board: Any = None
        if folder.is_local and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter((folder / TENSORBOARD).path, purge_step=step + 1)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """One more line, of the state after `step` steps."""
        self._lines.append({"step": step, **figures})
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def write(self) -> None:
        """Put all lines so far where others read them."""
        self._file.write("".join(json.dumps(line) + "\n" for line in self._lines).encode())
        if self._board is not None:
            self._board.flush()


def read_curves(folder: Folder) -> list[dict[str, float]]:
    """The lines of a run; none where it has written none."""
    file = folder / LINES
    if file.size() is None:
        return []
    return [json.loads(line) for line in file.read().splitlines()]


def draw_curves(lines: Sequence[Mapping[str, float]], metric: str) -> bytes:
    """The curves of a run as a PNG: loss and learning rate, where the time goes, and `metric` if it was measured."""
    from matplotlib.figure import Figure

    measured = [line for line in lines if metric in line]
    trained = [line for line in lines if "loss" in line]
    figure = Figure(figsize=(5 * (3 if measured else 2), 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if measured else 2)
    steps = [line["step"] for line in trained]
    loss, rate = axes[0], axes[0].twinx()
    loss.plot(steps, [line["loss"] for line in trained], color="tab:blue")
    rate.plot(steps, [line["learning_rate"] for line in trained], color="tab:gray", linestyle=":")
    loss.set(title="Loss (blue) and learning rate (dotted)", xlabel="step", ylabel="loss")
    rate.set_ylabel("learning rate")
    parts = [name for name in (trained[-1] if trained else {}) if name.startswith("share_")]
    axes[1].stackplot(
        steps, [[line[name] for line in trained] for name in parts], labels=[p.removeprefix("share_") for p in parts]
    )
    axes[1].set(title="Where the time goes", xlabel="step", ylabel="share of the time", ylim=(0, 1))
    axes[1].legend(loc="lower left", fontsize="small", framealpha=0.9)
    if measured:
        at = [line["step"] for line in measured]
        for name, style in ((metric, "-"), (f"{metric} labels only", "--"), (f"{metric} instances only", ":")):
            if name in measured[0]:
                axes[2].plot(at, [line[name] for line in measured], style, marker="o", label=name)
        axes[2].set(title="Held-out rows", xlabel="step", ylabel="percent")
        axes[2].legend(fontsize="small")
    for axis in (axes[0], *axes[2:]):
        axis.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
