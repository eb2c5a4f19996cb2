"""Diffusion training on top of transformers.Trainer.

What it changes: the loss (one normalisation for the whole optimizer step, across micro-batches and
processes), the noise (a function of seed, step and global row), evaluation (the NELBO of the held-out
rows), what a checkpoint holds, and `metrics.jsonl`, from which cards and tracking are fed.
"""

# Shapes: B rows, L positions, N blocks, K views, M scored positions

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from a2d_core import likelihood, noise
from a2d_core.config import TrainConfig, UserError, require
from a2d_core.models import DiffusionModel, multiplies_bfloat16

EVAL_SEED = 20_503_09573
"""Seed of the evaluation noise: the same for every checkpoint, so that their scores can be compared."""

Batch = dict[str, Any]
Fill = Literal["block", "batch"] | None


def fit(
    model: DiffusionModel,
    config: TrainConfig,
    train_rows: Any,
    eval_rows: Any,
    collate: Callable[[list[dict[str, Any]]], Batch],
    output_dir: str | Path,
    *,
    stage: str,
    seed: int = 0,
    resume_from: str | None = None,
    fill: Fill = None,
) -> dict[str, Any]:
    """Train `model` on rows, evaluate on held-out rows, and write `output_dir/checkpoint-final`.

    `collate` makes {input_ids [B, L], labels [B, L], valid [B, L]}; label -100 is never masked or scored.
    `fill` says what lies behind the first end-of-sequence token of a row: further text (None), or fill up to a
    multiple of the block (`block`) or to the longest row (`batch`: the MDLM canvas, which the trainer extends to
    the longest row of the whole optimizer step). `resume_from`: a `checkpoint-N` directory.
    Returns the last evaluation's metrics, steps, and tokens per second.
    """
    output_dir = Path(output_dir)
    check_fits(model, config)
    if config.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = DiffusionTrainer(model, config, train_rows, eval_rows, collate, output_dir, stage=stage, seed=seed, fill=fill)
    if resume_from and _is_complete(Path(resume_from), config):
        trainer.take_up(Path(resume_from))
    else:
        trainer.train(resume_from_checkpoint=resume_from)
    metrics = trainer.evaluate()
    model.to(model.stored_dtype)
    trainer.save_model(str(output_dir / "checkpoint-final"))
    history = trainer.state.log_history
    rates, losses = ([row[name] for row in history if name in row] for name in ("tokens_per_second", "loss"))
    return {
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else None,
        "tokens_per_second": sum(rates) / len(rates) if rates else None,
        "memory_mb": _peak_memory_mb(),
        **metrics,
    }


def check_fits(model: DiffusionModel, config: TrainConfig) -> None:
    """Raise `UserError` where rows of `config.max_length` do not fit the model's context or its blocks."""
    context = model.context
    require(
        context is None or config.max_length <= context,
        f"max_length={config.max_length} is beyond the model's context of {context} positions: lower it to {context}",
    )
    block = model.objective.block_size
    require(
        block is None or config.max_length % block == 0,
        f"max_length={config.max_length} is not a multiple of the checkpoint's block_size={block}: "
        f"use {max(1, config.max_length // (block or 1)) * (block or 1)}",
    )


class DiffusionTrainer(Trainer):
    """transformers.Trainer with the loss, noise and evaluation of masked and block diffusion."""

    def __init__(
        self,
        model: DiffusionModel,
        config: TrainConfig,
        train_rows: Any,
        eval_rows: Any,
        collate: Callable[[list[dict[str, Any]]], Batch],
        output_dir: Path,
        *,
        stage: str,
        seed: int,
        fill: Fill = None,
    ) -> None:
        objective = model.objective
        self.diffusion, self.stage, self.noise_seed, self.fill = config, stage, seed, fill
        self.tokens_seen, self.clock = 0, time.perf_counter()

        def collate_with_blocks(rows: list[dict[str, Any]]) -> Batch:  # on the CPU, where a data-dependent shape costs no sync
            batch = collate(rows)
            return {**batch, "noised_blocks": objective.noised_blocks(batch["labels"])}

        super().__init__(
            model=model,
            args=training_arguments(config, output_dir, seed),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=collate_with_blocks,
            callbacks=[MetricsFile(output_dir)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, once for the whole step

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, for FSDP with float32 weights and gradients, and on a CPU too.

        accelerate would gather and reduce in bfloat16 where that is the precision, and round the loss and its weights to it:
        autocast does it as under DDP. And on a CPU it leaves the FSDP configuration out, which torch has no need for.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin, self.is_fsdp_enabled = FullyShardedDataParallelPlugin(), True
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.is_fsdp_enabled:
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """The autocast that accelerate puts around the forward of other models."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager(cache_enabled)

    # --- one optimizer step ---

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step, each with its noise, and views x maskable tokens of the whole step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, torch.tensor(1, device=device)
        longest = self._over_processes(max(batch["labels"].shape[1] for batch in batches), device).max()
        if self.fill == "batch":
            batches = [self._extend(batch, int(longest)) for batch in batches]
        model: DiffusionModel = self.model
        maskable = sum(model.objective.maskable(batch["labels"]).sum() for batch in batches)
        rank, world, offset = self.accelerator.process_index, self.accelerator.num_processes, 0
        total_rows = sum(len(batch["labels"]) for batch in batches) * world
        for batch in batches:
            rows = len(batch["labels"])
            batch["global_row"] = torch.arange(offset + rank * rows, offset + (rank + 1) * rows, device=batch["labels"].device)
            batch["total_rows"], batch["most_blocks"] = total_rows, model.objective.blocks(int(longest))
            offset += world * rows
        return batches, self._over_processes(maskable, device).sum() * self.diffusion.views

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """This process's share of the step's loss, times the number of processes, because DDP averages over them."""
        layout = self.noised_layout(inputs)
        total, _ = model(layout, not self.diffusion.predict_mask_token)
        assert num_items_in_batch is not None, "get_batch_samples counts the maskable tokens"
        loss = total / num_items_in_batch * self.accelerator.num_processes
        self.tokens_seen += inputs["labels"].numel() * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def noised_layout(self, inputs: Batch) -> Any:
        """Draw t and the masks of a micro-batch, and lay out its forward pass."""
        config, objective, labels_BL = self.diffusion, self.model.objective, inputs["labels"]
        block_L = objective.block_of(torch.arange(labels_BL.shape[1], device=labels_BL.device))
        t_KBL, is_masked_KBL = corrupt(
            config, self.noise_seed, self.state.global_step, inputs["global_row"], block_L,
            objective.maskable(labels_BL) & inputs["valid"], total_rows=inputs["total_rows"], blocks=inputs["most_blocks"],
        )  # fmt: skip
        weight_KBL = noise.nelbo_weight(t_KBL, config.schedule) if config.weighting == "nelbo" else torch.ones_like(t_KBL)
        return objective.layout(inputs["input_ids"], inputs["valid"], is_masked_KBL, weight_KBL, inputs["noised_blocks"])

    def _extend(self, batch: Batch, length: int) -> Batch:
        """Fill every row to `length` with the end-of-sequence token, attended and maskable."""
        more = length - batch["labels"].shape[1]
        fill = self.model.eos_token_id
        pad = torch.nn.functional.pad
        return {
            **batch,
            "input_ids": pad(batch["input_ids"], (0, more), value=fill),
            "labels": pad(batch["labels"], (0, more), value=fill),
            "valid": pad(batch["valid"], (0, more), value=True),
        }

    def _over_processes(self, value: Any, device: torch.device) -> Tensor:
        return self.accelerator.gather(torch.as_tensor(value, device=device).reshape(1))

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The NELBO of the held-out rows in nats per token, with its standard error over rows, and the perplexity bound.

        `nelbo_answer` leaves out the fill behind a row's first end-of-sequence token, where rows are filled.
        """
        self.model.eval()
        gathered: list[Tensor] = []
        for batch in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager():
                estimate = likelihood.nelbo(
                    self.model, batch["input_ids"], batch["labels"], batch["valid"],
                    samples=2, seed=EVAL_SEED, rows_B=batch["row"],
                )  # fmt: skip
            is_answer_BL = ~_is_fill(batch["labels"], self.model.eos_token_id)
            scored_BL = self.model.objective.maskable(batch["labels"]) & batch["valid"]
            parts = estimate.nats_B, estimate.tokens_B, (estimate.nats_BL * is_answer_BL).sum(1), (scored_BL & is_answer_BL).sum(1)
            gathered.append(self.accelerator.gather_for_metrics(torch.stack(parts, dim=1)).double().cpu())
        nats_R, tokens_R, answer_nats_R, answer_tokens_R = torch.cat(gathered).unbind(1)
        nelbo = nats_R.sum() / tokens_R.sum()
        stderr = (nats_R - nelbo * tokens_R).std() * math.sqrt(len(nats_R)) / tokens_R.sum()  # of a ratio of sums
        metrics = {"nelbo": float(nelbo), "nelbo_stderr": float(stderr), "perplexity_bound": float(nelbo.exp())}
        if self.fill:
            metrics["nelbo_answer"] = float(answer_nats_R.sum() / answer_tokens_R.sum())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.clock, self.tokens_seen = time.perf_counter(), 0  # evaluation is no training time
        return metrics

    # --- logs and checkpoints ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed and memory to a loss, and stop where the loss is no number."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"the loss became {logs['loss']} at step {self.state.global_step}: lower learning_rate={self.diffusion.learning_rate} "
                    f"or raise warmup_ratio={self.diffusion.warmup_ratio}; the checkpoints before it are kept in {self.args.output_dir}"
                )
            now = time.perf_counter()
            logs["tokens_per_second"] = self.tokens_seen / (now - self.clock)
            logs["memory_mb"] = _peak_memory_mb()
            self.clock, self.tokens_seen = now, 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint directory, with whole weights where FSDP shares them out (DDP and ZeRO-2 do not)."""
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # not the weights, which Trainer would write once more
        save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, by which a checkpoint is known to be whole, comes after all of them

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            tied = {f"network.{name}" for name in self.model.network.all_tied_weights_keys}  # gathered, they share no memory any more
            state_dict = {name.removeprefix("network."): value for name, value in state_dict.items() if name not in tied}
        record = {
            "stage": self.stage,
            "step": self.state.global_step,
            "seed": self.noise_seed,
            "config": dataclasses.asdict(self.diffusion),
        }
        self.model.save(directory, stage=record, state_dict=state_dict)

    def take_up(self, checkpoint: Path) -> None:
        """Load the weights and the history of a checkpoint at which training was complete."""
        self.model.to(self.args.device)  # where it would be shared out, it is still on the CPU
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        state = {}
        for file in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            state.update(safetensors.torch.load_file(file))
        network = self.model.network
        loaded = set_model_state_dict(network, state, options=StateDictOptions(full_state_dict=True, strict=False))
        tied = set(network.all_tied_weights_keys)
        require(
            not loaded.unexpected_keys and set(loaded.missing_keys) <= tied,
            f"checkpoint '{resume_from_checkpoint}' does not fit the model: missing {sorted(set(loaded.missing_keys) - tied)[:3]}, "
            f"unexpected {loaded.unexpected_keys[:3]}. Resume with the model it was trained from",
        )


class MetricsFile(TrainerCallback):
    """Appends every logged row to `metrics.jsonl`, and prints it where there is no terminal for a progress bar.

    The file is made anew from the restored history when training begins, so that a resumed run has each step once.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "metrics.jsonl"

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what a checkpoint remembers."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in state.log_history))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the newest row."""
        if not state.is_world_process_zero:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({**state.log_history[-1], "max_steps": state.max_steps}) + "\n")
        is_milestone = "loss" not in (logs or {}) or state.global_step % max(1, state.max_steps // 20) < args.logging_steps
        if args.disable_tqdm and is_milestone:
            shown = {k: v for k, v in state.log_history[-1].items() if k not in ("step", "epoch", "total_flos")}
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"step {state.global_step}/{state.max_steps}  {numbers}", flush=True)


def training_arguments(config: TrainConfig, output_dir: Path, seed: int) -> TrainingArguments:
    """The transformers form of a `TrainConfig`.

    It differs from the defaults of transformers in: no integration reports (tracking reads metrics.jsonl), no column
    is dropped, and a NaN loss is seen rather than filtered.
    """

    def interval(every: float) -> float | int:
        return every if every < 1 else int(every)

    by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # which accelerate leaves out where it is told to use a CPU
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta2=config.adam_beta2,
        optim="adamw_torch_fused",
        bf16=config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16()),
        use_cpu=not torch.cuda.is_available() and not by_deepspeed,
        ddp_backend="gloo" if by_deepspeed and not torch.cuda.is_available() else None,
        seed=seed,
        data_seed=seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=interval(config.eval_every),
        save_strategy="steps",
        save_steps=interval(config.save_every),
        save_total_limit=config.keep_checkpoints,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=not sys.stderr.isatty(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # one process has one GPU: Trainer would wrap several visible ones in DataParallel
    return arguments


def corrupt(
    config: TrainConfig, seed: int, step: int, rows_B: Tensor, block_L: Tensor, is_maskable_BL: Tensor, *, total_rows: int, blocks: int
) -> tuple[Tensor, Tensor]:
    """The times t_KBL and the masks is_masked_KBL of the given global rows of one optimizer step, as the configuration draws them."""
    views = config.views // 2 if config.complementary else config.views
    t_max = 1 - config.t_min if config.complementary else config.t_max
    t_KBN = noise.draw_t(
        config.t_draws, seed, step, rows_B, total_rows=total_rows, blocks=blocks, views=views, t_min=config.t_min, t_max=t_max
    )
    t_KBL = t_KBN[:, :, block_L]
    is_masked_KBL = noise.draw_mask(seed, step, rows_B, 1 - noise.alpha(t_KBL, config.schedule), is_maskable_BL)
    if config.complementary:  # a complement at t is a mask at 1 - t, and has that time's weight
        return torch.cat([t_KBL, 1 - t_KBL]), torch.cat([is_masked_KBL, is_maskable_BL & ~is_masked_KBL])
    return t_KBL, is_masked_KBL


def _is_complete(checkpoint: Path, config: TrainConfig) -> bool:
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    return config.max_steps in (-1, state["max_steps"]) and state["global_step"] >= state["max_steps"]


def _is_fill(labels_BL: Tensor, eos: int) -> Tensor:
    """Positions behind the first end-of-sequence label of a row."""
    is_eos_BL = labels_BL == eos
    return (is_eos_BL.cumsum(1) - is_eos_BL.long()) > 0


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
