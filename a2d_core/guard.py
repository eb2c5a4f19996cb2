"""What ends a training before its time: SIGTERM, and a loss or gradient that is no number or explodes.

All processes end at the same step. What they agree on goes over a group of its own on the CPU, so that no GPU is waited for;
losses and norms are read at every step on the CPU, and on a GPU where a step is logged or saved, before it is.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from a2d_core import checkpoints
from a2d_core.config import StoppedError, TrainConfig, UserError

NEVER = 2**62
LEAST_NORMS = 10
"""So many norms must have been logged before one can be told to explode."""
MOST_NORMS = 100
"""The median is of the last so many."""
MOST_ROWS = 32
"""A message names so many rows."""


@dataclass
class Step:
    """What one optimizer step has shown in this process: a loss and the rows of each micro-batch, and the gradient's norm."""

    losses: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    norm: Any = 0.0


class Guard(TrainerCallback):
    """Looks at each step, and ends the training with a `StoppedError` after SIGTERM, or a `UserError` where it diverges."""

    def __init__(self, config: TrainConfig, output_dir: Path) -> None:
        self.config, self.output_dir = config, output_dir
        self.is_told = False
        self.steps: dict[int, Step] = {}
        self.group: Any = None

    # --- what the trainer tells ---

    def add_loss(self, step: int, loss: Tensor, rows: Tensor) -> None:
        """A micro-batch's loss and the numbers of its rows; nothing is read from a GPU yet."""
        self.steps.setdefault(step, Step()).losses.append(loss)
        self.steps[step].rows.append(rows)

    def add_norm(self, step: int, norm: Any) -> None:
        """The gradient's norm before it is clipped."""
        self.steps.setdefault(step, Step()).norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a wish to stop at the end of a step; one that no step has answered is answered after the body."""
        is_main_thread = threading.current_thread() is threading.main_thread()  # Python takes signals there alone
        previous = signal.signal(signal.SIGTERM, self._hear) if is_main_thread else None
        try:
            yield
        finally:
            if is_main_thread:
                signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
        if self.is_told:
            os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, number: int, frame: object) -> None:
        self.is_told = True

    # --- what the trainer asks ---

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Found the group in which the processes agree."""
        if args.world_size > 1 and self.group is None:
            self.group = distributed.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint where SIGTERM has come; read the losses where it is time to."""
        self._heed(control)
        if args.device.type == "cpu" or control.should_log:
            self.check(state)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint where SIGTERM has come meanwhile, so that no further step is begun."""
        self._heed(control)

    def _heed(self, control: TrainerControl) -> None:
        control.should_save |= self._is_ending()

    def _is_ending(self) -> bool:
        """Whether SIGTERM has come to any process."""
        return self._least(0 if self.is_told else 1) == 0

    def saved(self, state: TrainerState) -> None:
        """A checkpoint is whole: end here with a `StoppedError`, where SIGTERM has come."""
        if not self._is_ending():
            return
        raise StoppedError(
            f"stopped by SIGTERM at step {state.global_step} of {state.max_steps}, with nothing lost: {checkpoints.go_on(self.output_dir)}"
        )

    # --- divergence ---

    def check(self, state: TrainerState) -> None:
        """Read the losses and norms since the last check: nothing may be saved that comes after a bad one."""
        limit = self._limit(state)
        bad = self._least(min((number for number, step in self.steps.items() if _is_bad(step, limit)), default=NEVER))
        if bad < NEVER:
            self._diverged(bad, limit)
        self.steps.clear()

    def _limit(self, state: TrainerState) -> float:
        """The norm above which a gradient has exploded. It comes from the logged norms, so that a resumed run has the same."""
        norms = [row["grad_norm"] for row in state.log_history if "grad_norm" in row][-MOST_NORMS:]
        if not self.config.explode_factor or len(norms) < LEAST_NORMS:
            return math.inf
        return self.config.explode_factor * max(statistics.median(norms), self.config.max_grad_norm)

    def _diverged(self, number: int, limit: float) -> None:
        step = self.steps[number]
        batches = self._gather([(float(loss), rows.tolist()) for loss, rows in zip(step.losses, step.rows, strict=True)])
        loss, norm = sum(loss for loss, _ in batches), float(step.norm)
        if not math.isfinite(loss):
            what = f"the loss became {loss}"
        elif not math.isfinite(norm):
            what = f"the gradient's norm became {norm}"
        else:
            what = f"the gradient's norm exploded to {norm:.4g}, above {limit:.4g} (explode_factor={self.config.explode_factor:g})"
        everything = math.isfinite(loss)
        indices = [row for loss, rows in batches if everything or not math.isfinite(loss) for row in rows]
        more = f" and {len(indices) - MOST_ROWS} more" if len(indices) > MOST_ROWS else ""
        config = self.config
        raise UserError(
            f"{what} at step {number}: lower learning_rate={config.learning_rate} or max_grad_norm={config.max_grad_norm}, "
            f"or raise warmup_ratio={config.warmup_ratio}; it was computed from rows {str(indices[:MOST_ROWS])[1:-1]}{more} of the "
            f"training data, which may be damaged; {checkpoints.go_on(self.output_dir)}"
        )

    # --- among the processes ---

    def _least(self, value: int) -> int:
        """The least of the processes' values."""
        if self.group is None:
            return value
        shared = torch.tensor(value)
        distributed.all_reduce(shared, distributed.ReduceOp.MIN, self.group)
        return int(shared)

    def _gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes, one behind the other."""
        if self.group is None:
            return values
        parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather_object(parts, values, self.group)
        return [value for part in parts for value in part]


def _is_bad(step: Step, limit: float) -> bool:
    """Whether a loss is not finite, or the norm is not, or is above the limit."""
    device = step.losses[0].device
    values = torch.stack([torch.as_tensor(value, device=device, dtype=torch.float32) for value in (*step.losses, step.norm)]).tolist()
    return not all(map(math.isfinite, values)) or values[-1] > limit
