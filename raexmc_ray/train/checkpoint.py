"""Checkpoints of a run: complete, written beside the training, never resumed from when torn.

    RUN/checkpoints/step-00000500/
      encoder/              an encoder like any other: `raexmc build --encoder` takes it
      optimizer.safetensors moments of AdamW
      state.json            where the run stands: see loop.State
      checkpoint.json       size and sha256 of every file above; written last

Ray Train's own checkpoints are not used: a report's return does not mean that its checkpoint is committed, and its
list of checkpoints is written in place, so that a kill can tear it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder, describe_file

ENCODER, OPTIMIZER, STATE, SEAL = "encoder", "optimizer.safetensors", "state.json", "checkpoint.json"
DAMAGE = (ValueError, KeyError, TypeError, FileNotFoundError)
"""What is raised where a file is gone, or is not what was written; any other OSError may pass."""
logger = logging.getLogger("raexmc_ray")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was checked."""

    folder: Folder
    step: int
    state: dict[str, Any]

    @property
    def encoder(self) -> Folder:
        return self.folder / ENCODER

    def restore(self, encoder: TextEncoder, optimizer: torch.optim.Optimizer) -> None:
        """Give an encoder of the same shape, and its optimiser, the weights that they had."""
        saved = TextEncoder.load(self.encoder.path)
        encoder.load_state_dict(saved.state_dict())
        _restore_optimizer(optimizer, load_file((self.folder / OPTIMIZER).path))


class Checkpoints:
    """The checkpoints of one run. One process, the first rank's, writes; all read."""

    def __init__(self, folder: Folder, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def at(self, step: int) -> Folder:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Of all checkpoints, whole or not, ascending."""
        return sorted(int(name.removeprefix("step-")) for name in self.folder.names())

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. One that is torn or altered is named in the log.

        Raises OSError where one cannot be read now: it may be whole, and what is older is no substitute for it.
        """
        for step in reversed(self.steps()):
            checkpoint = self.open(step)
            if checkpoint is not None:
                return checkpoint
        return None

    def open(self, step: int) -> Checkpoint | None:
        """The checkpoint of this step, or None where there is none or it is not whole. Raises OSError as `latest`."""
        folder = self.at(step)
        if (folder / SEAL).size() is None:
            return None
        try:
            entries = json.loads((folder / SEAL).read())["files"]
            whole = all(
                (folder / name).size() == entry["size"] and (folder / name).sha256() == entry["sha256"]
                for name, entry in entries.items()
            )
            if whole:
                return Checkpoint(folder, step, json.loads((folder / STATE).read()))
        except DAMAGE:
            pass
        logger.warning("%s: this checkpoint is damaged and is passed over", folder)
        return None

    def write(self, step: int, encoder: TextEncoder, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Start to write the checkpoint of this step; training goes on. A write under way is waited for first.

        state: its `best_step` names the best checkpoint so far, which stays as long as this one; −1 for none.
        """
        self.wait()
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in encoder.model.state_dict().items()}
        moments = {
            f"{i}.{name}": value.detach().to("cpu", copy=True).contiguous()
            for i, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }

        def save(folder: Path) -> None:
            encoder.save(folder / ENCODER, weights)
            save_file(moments, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state))

        self._pending = self._writer.submit(self._write, step, save)

    def wait(self) -> None:
        """Until no write is under way. Raises what the write raised."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, step: int, save: Callable[[Path], None]) -> None:
        folder = self.at(step)
        (folder / SEAL).remove_file()  # of an earlier life of this run: about to be replaced by its equal
        folder.remove()
        with folder.filling() as local:
            save(local)
            files = {str(p.relative_to(local)): describe_file(p) for p in sorted(local.rglob("*")) if p.is_file()}
        seal = {"format_version": 1, "files": {name: entry.model_dump() for name, entry in files.items()}}
        (folder / SEAL).write(json.dumps(seal, indent=2).encode())
        self._drop_old(step)

    def _drop_old(self, newest: int) -> None:
        """Delete all but the newest few whole ones and the best that each of them names, for the run may have to go on
        from any of them: the seal first, so that what is half deleted is not whole. What is of a later step than the
        newest is not whole, or the run had gone on from there."""
        whole = [step for step in self.steps() if step <= newest and (self.at(step) / SEAL).size() is not None]
        kept = set(whole[-self._keep :])
        kept |= {self._best_of(step) for step in kept}
        for step in self.steps():
            if step not in kept:
                folder = self.at(step)
                try:
                    (folder / SEAL).remove_file()
                    folder.remove()
                except OSError as error:  # NFS keeps a file that some process has open; the next write tries again
                    logger.warning(
                        "%s: this old checkpoint could not be deleted (%s): it only takes space", folder, error
                    )

    def _best_of(self, step: int) -> int:
        """The step of the best checkpoint that this one names; −1 where it is damaged: no run goes on from it. Raises
        OSError where it cannot be read now: the best may be what nothing else keeps."""
        try:
            return int(json.loads((self.at(step) / STATE).read())["best_step"])
        except DAMAGE:
            return -1


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give it these moments: copies, for the tensors are maps of a file that will be deleted, and it keeps them."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
