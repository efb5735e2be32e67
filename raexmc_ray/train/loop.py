"""The training loop of one rank. Free of Ray: alone, or one of the ranks of a `torch.distributed` group.

A run is a pure function of its recipe and data: what a step does follows from its number, and from the weights and
the mined neighbours, which are in the run's folder. So a run that goes on from a checkpoint ends with the same
weights, to the bit on the CPU, as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from safetensors.numpy import load, save

from raexmc_ray.encoder import TextEncoder, bfloat16_is_native
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Precision, Recipe
from raexmc_ray.tokens import Tokens
from raexmc_ray.train.checkpoint import Checkpoints
from raexmc_ray.train.curves import Curves
from raexmc_ray.train.gather import from_first, sum_over_ranks
from raexmc_ray.train.meter import Meter
from raexmc_ray.train.mining import Part, embed_part, mine
from raexmc_ray.train.sampler import Mined, Sampler
from raexmc_ray.train.step import (
    Prepared,
    accumulate_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    prepare,
)
from raexmc_ray.train.validate import HeldOut, validate

AHEAD = 2
"""Batches that are prepared, each in a thread of its own, while one is trained on."""
LINES = 500
"""Lines of the curves in a whole run, evaluations aside."""
TIMED_STEPS = 5
"""Steps, after the first, from which the time of the whole run is told."""
BROKEN_BATCH = "broken-batch.json"
"""In a run's folder: the uids of the batch whose loss is not finite."""
UIDS_SAID = 256
"""Of those, so many are told in the error, too: all of a batch of the default's size."""

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, as flat arrays: tokens of N instances and L labels, CSR [N, L], and rows held out.

    uids: Arrow strings [N]. The rows here are not the corpus's where some are held out: people are told uids.
    """

    uids: pa.ChunkedArray
    instances: Tokens
    labels: Tokens
    relevance: sp.csr_matrix
    held_out: HeldOut | None = None


@dataclass
class State:
    """Where a run stands: all that a checkpoint holds beside the weights and the optimiser's moments.

    The learning rate, the batches and the dropout follow from `step`, so there is no generator to save.
    """

    step: int = 0
    """Steps done."""
    best: float | None = None
    """Best value of the chosen metric so far."""
    best_step: int = -1
    worse: int = 0
    """Evaluations since the best one."""
    finished: bool = False
    precision: Precision | None = None
    """What all ranks compute in; None before it is agreed on. Kept, for the next start may be on other hardware."""


class NonFiniteLossError(ArithmeticError):
    """The loss, a gradient or a weight is not finite: the same steps would end there again, so nothing is retried."""


class Loop:
    """Trains until the last epoch is done, or the held-out metric gets no better."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        encoder: TextEncoder,
        folder: Folder,
        report: Report,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """encoder: on its device, with the weights that a new run starts from. folder: of this run alone.
        report: told (steps done, figures) after each step; without figures, where the run begins or goes on; and where
        it mines or evaluates: 1 as that begins, 0 as it ends, by its name."""
        settings = recipe.training
        self.recipe, self.settings, self.data, self.encoder = recipe, settings, data, encoder
        self.folder, self.rank, self.ranks, self.report = folder, rank, ranks, report
        self.sampler = Sampler(
            data.relevance,
            settings.batch_size,
            settings.positives_per_instance,
            settings.seed,
            mined_labels=settings.mining.labels,
            rank=rank,
            ranks=ranks,
        )
        self.steps = settings.epochs * self.sampler.steps
        self.optimizer = make_optimizer(encoder, settings)
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.cluster.checkpoints_kept)
        self.meter = Meter(encoder.device)
        self.state = State()
        self._losses: list[float] = []
        self._rows_B: np.ndarray | None = None  # of the last step's batch
        self._ends: list[float] = []
        self._parts: tuple[int, Part, Part] | None = None

    def run(self) -> State:
        """Go on from the newest whole checkpoint to the end. Raises NonFiniteLossError."""
        self._resume()
        self.report(self.state.step, {})
        self.encoder.train()
        while not self.state.finished:
            epoch, first = divmod(self.state.step, self.sampler.steps)
            self._begin(epoch)
            self._train_epoch(epoch, first)
        self.checkpoints.wait()
        return self.state

    def _resume(self) -> None:
        """Every rank takes the checkpoint that the first one found, and computes in the same precision."""
        found = self.checkpoints.latest() if self.rank == 0 else None
        device = self.encoder.device
        step = int(from_first(torch.tensor(found.step if found else -1, device=device), self.ranks))
        checkpoint = found if self.rank == 0 else self.checkpoints.open(step)
        if step >= 0:
            if checkpoint is None:
                raise FileNotFoundError(
                    f"{self.checkpoints.at(step)}: rank {self.rank} cannot read the checkpoint that rank 0 read: "
                    "cluster.storage must be a folder that every node sees"
                )
            checkpoint.restore(self.encoder, self.optimizer)
            self.state = State(**checkpoint.state)
        self.state.precision = self.state.precision or agree_on_precision(self.settings.precision, device, self.ranks)
        self.encoder.place(device, getattr(torch, self.state.precision))
        if self.rank == 0:
            self.curves = Curves(self.folder, self.state.step)

    def _begin(self, epoch: int) -> None:
        """Have the hard negatives of this epoch: look them up where they are due, else read what was found."""
        mining = self.settings.mining
        if not mining.on:
            return
        mined_in = self._mined_in(self.state.step)
        file = self.folder / "mined" / _mined_name(epoch if mined_in is None else mined_in)
        if mined_in is None:
            with self._aside("mining"):
                instances, labels = self._embed()
                rng = np.random.default_rng([self.settings.seed, epoch, 1])
                mined = mine(instances, labels, self.data.relevance, mining, rng)
            if self.rank == 0:
                file.write(save({"grouped": mined.grouped, "groups": mined.groups, "labels": mined.labels}))
                self._drop_old_mined(epoch)
        else:
            mined = Mined(**load(file.read()))
        self.sampler.use(mined)

    def _mined_in(self, step: int) -> int | None:
        """The epoch whose hard negatives a run goes on with after so many steps; None where it looks for new ones."""
        epoch, first = divmod(step, self.sampler.steps)
        due = epoch - epoch % self.settings.mining.every
        return None if epoch == due and first == 0 else due

    def _drop_old_mined(self, epoch: int) -> None:
        """Delete what was mined but in this epoch, and in those that a checkpoint goes on with."""
        self.checkpoints.wait()  # one may be on its way
        needed = {epoch, *map(self._mined_in, self.checkpoints.steps())}
        names = {_mined_name(one) for one in needed if one is not None}
        folder = self.folder / "mined"
        for name in folder.names():
            if name not in names:
                folder.filesystem.delete_file((folder / name).path)

    def _train_epoch(self, epoch: int, first: int) -> None:
        batches = self._batches(epoch, first)
        while not self.state.finished and self.state.step < (epoch + 1) * self.sampler.steps:
            with self.meter("data"):
                prepared = next(batches)
            rate = self._step(prepared)
            self._after_step(rate, prepared.batch.rows_B)
            self._tell_time()

    def _tell_time(self) -> None:
        """Report once what a step takes, from a few steps after the first."""
        self._ends = [*self._ends, time.perf_counter()][: TIMED_STEPS + 2]
        if len(self._ends) == TIMED_STEPS + 1:
            self.report(self.state.step, {"seconds_per_step": (self._ends[-1] - self._ends[0]) / TIMED_STEPS})

    def _batches(self, epoch: int, first: int) -> Iterator[Prepared]:
        """The batches of an epoch; the next ones are prepared while one is trained on."""

        def make(step: int) -> Prepared:
            batch = self.sampler.batch(epoch, step)
            place = (epoch, step)
            tokens = self.data.instances, self.data.labels
            return prepare(batch, self.encoder, *tokens, self.settings, place, self.rank, self.ranks)

        with ThreadPoolExecutor(AHEAD, thread_name_prefix="batches") as threads:
            steps = iter(range(first, self.sampler.steps))
            coming = deque(threads.submit(make, step) for step in islice(steps, AHEAD))
            while coming:
                prepared = coming.popleft().result()
                coming.extend(threads.submit(make, step) for step in islice(steps, 1))
                yield prepared

    def _step(self, prepared: Prepared) -> float:
        """One step of the optimiser; returns its learning rate."""
        rate = learning_rate(self.settings, self.state.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._parts = None  # of the weights before this step: they are as large as the memory, and of no more use
        loss = accumulate_gradients(self.encoder, prepared, self.settings, self.meter).item()
        with self.meter("optimizer"):
            if not (math.isfinite(loss) and math.isfinite(gradient_norm(self.encoder).item())):
                said = f"the loss is {loss} or its gradient is not finite in step {self.state.step + 1}"
                if self._rows_B is not None and self._weights_are_broken():
                    said += f", for step {self.state.step} has broken the weights"
                    raise self._not_finite(said, self._rows_B)
                raise self._not_finite(said, prepared.batch.rows_B)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.meter.count(len(prepared.batch.rows_B), prepared.tokens, prepared.cells)
        self._losses.append(loss)
        self._rows_B = prepared.batch.rows_B
        self.state.step += 1
        return rate

    def _after_step(self, rate: float, rows_B: np.ndarray) -> None:
        """Evaluate, note and save what is due after a step on these rows."""
        step = self.state.step
        epoch, rest = divmod(step, self.sampler.steps)
        every = self.settings.evaluation.every
        figures = {"epoch": step / self.sampler.steps, "loss": self._losses[-1], "learning_rate": rate}
        self.report(step, figures)
        if step % max(1, self.steps // LINES) == 0 or step == self.steps:
            if self.rank == 0:
                self.curves.add(step, figures | {"loss": float(np.mean(self._losses))} | self.meter.read())
            self._losses.clear()
        evaluated = bool(every) and rest == 0 and (epoch % every == 0 or step == self.steps)
        due = step % self.recipe.cluster.checkpoint_every == 0
        if (due or evaluated or step == self.steps) and self._weights_are_broken():
            raise self._not_finite(f"weights are not finite after step {step}", rows_B)
        if evaluated:
            self._evaluate()
        self.state.finished |= step == self.steps
        if due or self.state.finished or (evaluated and self.state.best_step == step):
            self._save()

    def _evaluate(self) -> None:
        held_out, settings = self.data.held_out, self.settings.evaluation
        assert held_out is not None, "the trainer holds rows out where it is to evaluate"
        with self._aside("evaluation"):
            figures = validate(self.encoder, held_out, *self._embed(), self.data.relevance, self.recipe)
        state = self.state
        if state.best is None or figures[settings.metric] > state.best:
            state.best, state.best_step, state.worse = figures[settings.metric], state.step, 0
        else:
            state.worse += 1
        state.finished = 0 < settings.patience <= state.worse
        self.report(state.step, figures)
        if self.rank == 0:
            self.curves.add(state.step, figures)

    @contextmanager
    def _aside(self, what: str) -> Iterator[None]:
        """No step is taken inside: the report is told when that begins and when it ends."""
        self.report(self.state.step, {what: 1.0})
        with self.meter(what):
            yield
        self.report(self.state.step, {what: 0.0})

    def _save(self) -> None:
        if self.rank == 0:
            with self.meter("checkpoint"):
                self.checkpoints.write(self.state.step, self.encoder, self.optimizer, asdict(self.state))
                self.curves.write()

    def _embed(self) -> tuple[Part, Part]:
        """This rank's part of the keys' embeddings by the encoder as it is; evaluation and mining share them."""
        if self._parts is None or self._parts[0] != self.state.step:
            size = self.recipe.encoder.batch_size
            instances, labels = (
                embed_part(self.encoder, tokens, size, self.rank, self.ranks)
                for tokens in (self.data.instances, self.data.labels)
            )
            self._parts = self.state.step, instances, labels
        return self._parts[1:]

    def _weights_are_broken(self) -> bool:
        """Whether any rank has a weight that is not finite: a step may break them whose loss and gradient are finite.
        Looked at only where a checkpoint may be written, for it reads all of them."""
        finite = torch.stack([torch.isfinite(p).all() for p in self.encoder.parameters()]).all()
        broken = (~finite).float()
        sum_over_ranks([broken], self.ranks)
        return bool(broken)

    def _not_finite(self, said: str, rows_B: np.ndarray) -> NonFiniteLossError:
        self.checkpoints.wait()
        checkpoint = self.checkpoints.latest()
        uids, file = self.data.uids.take(rows_B).to_pylist(), self.folder / BROKEN_BATCH
        if self.rank == 0:
            self.curves.write()  # what led there
            file.write(json.dumps(uids).encode())
        more = f" and {len(uids) - UIDS_SAID:,} more, all in {file}" if len(uids) > UIDS_SAID else ""
        return NonFiniteLossError(
            f"{said}; training stopped and wrote nothing from it: look at the texts of its batch, or lower "
            f"training.learning_rate. Last good checkpoint: {checkpoint.folder if checkpoint else 'none yet'}. uids of "
            f"the batch: {json.dumps(uids[:UIDS_SAID])}{more}"
        )


def agree_on_precision(wanted: Precision, device: torch.device, ranks: int = 1) -> Precision:
    """What every rank computes in: `auto` is bfloat16 where all of them compute in it natively, the same on each."""
    if wanted != "auto":
        return wanted
    lacking = torch.tensor(float(not bfloat16_is_native(device)), device=device)
    sum_over_ranks([lacking], ranks)
    return "float32" if lacking else "bfloat16"


def _mined_name(epoch: int) -> str:
    return f"epoch-{epoch:05d}.safetensors"
