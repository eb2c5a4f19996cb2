"""Diffusion training on top of transformers.Trainer.

What it changes: the loss (one normalisation for the whole optimizer step, across micro-batches and
processes), the noise (a function of seed, step and global row), evaluation (the NELBO of the held-out
rows), what a checkpoint holds, and `metrics.jsonl`, from which cards and tracking are fed.
"""

# Shapes: B rows, R rows of an evaluation, T noised slots, N noised blocks, K views

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
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
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from a2d_core import checkpoints, likelihood, noise
from a2d_core.config import TrainConfig, require
from a2d_core.guard import Guard
from a2d_core.models import DiffusionModel, load, multiplies_bfloat16

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
    share_files: bool = True,
) -> dict[str, Any]:
    """Train `model` on rows, evaluate on held-out rows, and write `output_dir/checkpoint-final`.

    `collate` makes {streams, row: the rows' numbers [B], tokens: their number} of B rows.
    `fill` says what lies behind the end of a row: nothing (None), or fill up to a multiple of the block (`block`) or to
    the longest row (`batch`: the MDLM canvas, which the trainer extends to the longest row of the whole optimizer step).
    `resume_from`: a `checkpoint-N` directory. `share_files`: whether all processes see the same `output_dir`; where not, each
    node writes its part of a checkpoint into its own.
    Returns the last evaluation's metrics, steps, and tokens per second.
    """
    output_dir = Path(output_dir)
    check_fits(model, config)
    model.set_attention(config.attention)
    if config.lora_rank:
        from a2d_core import lora  # peft is needed for this alone

        lora.attach(model.network, config, model.spec.mask_token_id, in_bfloat16=computes_in_bfloat16(config), seed=seed)
    if config.gradient_checkpointing:
        model.checkpoint_activations(are_compiled=config.compile)
    if config.compile:
        model.compile_layers()
    trainer = DiffusionTrainer(
        model, config, train_rows, eval_rows, collate, output_dir, stage=stage, seed=seed, fill=fill, share_files=share_files
    )
    with trainer.guard.listening():
        if resume_from and _is_complete(Path(resume_from), config):
            trainer.take_up(Path(resume_from))
        else:
            trainer.train(resume_from_checkpoint=resume_from)
    metrics = trainer.evaluate()
    trainer.save_final(output_dir)
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
    model.require_room(config.max_length, f"max_length={config.max_length}", "lower it")
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
        share_files: bool = True,
    ) -> None:
        self.diffusion, self.stage, self.noise_seed, self.fill, self.share_files = config, stage, seed, fill, share_files
        self.tokens_seen, self.clock = 0, time.perf_counter()
        self.guard, self.writing = Guard(config, output_dir), output_dir

        super().__init__(
            model=model,
            args=training_arguments(config, output_dir, seed),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=collate,
            callbacks=[Progress(self), MetricsFile(output_dir), self.guard],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, once for the whole step

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.diffusion.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        tables = rows.select_columns("input_ids").with_format("arrow").iter(10_000)  # as Python lists, millions of rows take minutes
        lengths = [length for table in tables for chunk in table["input_ids"].chunks for length in chunk.value_lengths().to_pylist()]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroups(lengths, step, self.noise_seed)

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
        streams = [batch["streams"] for batch in batches]
        most = self._over_processes([max(x.noised_ids_BT.shape[1] for x in streams), max(x.chunks for x in streams)], device)
        longest, chunks = most.view(-1, 2).amax(0).tolist()
        if self.fill == "batch":
            streams = [x.extended(longest, self.model.eos_token_id) for x in streams]
        rank, world, offset = self.accelerator.process_index, self.accelerator.num_processes, 0
        total_rows = sum(len(batch["row"]) for batch in batches) * world
        for batch, stream in zip(batches, streams, strict=True):
            rows = len(batch["row"])
            batch["streams"], batch["total_rows"], batch["chunks"] = stream, total_rows, chunks
            batch["global_row"] = torch.arange(offset + rank * rows, offset + (rank + 1) * rows, device=device)
            offset += world * rows
        maskable = sum(stream.is_maskable_BT.sum() for stream in streams)
        return batches, self._over_processes(maskable, device).sum() * self.diffusion.views

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """This process's share of the step's loss, times the number of processes, because DDP averages over them."""
        layout = self.noised_layout(inputs)
        total, _ = model(layout, not self.diffusion.predict_mask_token)
        assert num_items_in_batch is not None, "get_batch_samples counts the maskable tokens"
        loss = total / num_items_in_batch * self.accelerator.num_processes
        self.tokens_seen += inputs["tokens"] * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one micro-batch; its loss is shown to the guard."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.add_loss(self.state.global_step + 1, loss, inputs["row"])
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.add_norm(self.state.global_step + 1, norm)
        return norm

    def noised_layout(self, inputs: Batch) -> Any:
        """Draw t and the masks of a micro-batch, and lay out its forward pass."""
        config, streams = self.diffusion, inputs["streams"]
        t_KBT, is_masked_KBT = corrupt(
            config, self.noise_seed, self.state.global_step, inputs["global_row"], streams.chunk_BT, streams.is_maskable_BT,
            total_rows=inputs["total_rows"], chunks=inputs["chunks"],
        )  # fmt: skip
        weight_KBT = noise.nelbo_weight(t_KBT, config.schedule) if config.weighting == "nelbo" else torch.ones_like(t_KBT)
        return self.model.objective.layout(streams, is_masked_KBT, weight_KBT)

    def _over_processes(self, value: Any, device: torch.device) -> Tensor:
        return self.accelerator.gather(torch.as_tensor(value, device=device).reshape(-1))

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The NELBO of the held-out rows in nats per token, with its standard error over rows (but for one), and the perplexity bound.

        `nelbo_answer` leaves out the fill behind the end of an answer, where rows are filled.
        """
        self.model.eval()
        gathered: list[Tensor] = []
        for batch in self.get_eval_dataloader(eval_dataset):
            streams = batch["streams"]
            with self.compute_loss_context_manager():
                estimate = likelihood.nelbo(self.model, streams, samples=2, seed=EVAL_SEED, rows_B=batch["row"])
            answer_BT = streams.is_maskable_BT & ~streams.is_fill_BT
            parts = estimate.nats_B, estimate.tokens_B, (estimate.nats_BT * answer_BT).sum(1), answer_BT.sum(1)
            gathered.append(self.accelerator.gather_for_metrics(torch.stack(parts, dim=1)).double().cpu())
        nats_R, tokens_R, answer_nats_R, answer_tokens_R = torch.cat(gathered).unbind(1)
        nelbo, stderr = likelihood.ratio(nats_R, tokens_R)
        assert nelbo is not None, "a row without tokens to score is left out where rows are made"
        found = {"nelbo": nelbo, "nelbo_stderr": stderr, "perplexity_bound": torch.tensor(nelbo, dtype=torch.float64).exp().item()}
        if self.fill:
            found["nelbo_answer"], _ = likelihood.ratio(answer_nats_R, answer_tokens_R)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items() if value is not None}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.clock, self.tokens_seen = time.perf_counter(), 0  # evaluation is no training time
        return metrics

    # --- logs and checkpoints ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed and memory to a loss; the mean loss of the whole training is that of all its steps, whenever it was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_second"] = self.tokens_seen / (now - self.clock)
            logs["memory_mb"] = _peak_memory_mb()
            self.clock, self.tokens_seen = now, 0
        super().log(logs, start_time)

    def written_whole(self, directory: Path) -> AbstractContextManager[Path]:
        """`checkpoints.whole` with all processes: the body fills the directory that it gets, which then becomes `directory`."""
        return checkpoints.whole(directory, is_main=self.keeps_directories(), meet=self.accelerator.wait_for_everyone)

    def keeps_directories(self) -> bool:
        """Whether this process makes, names and deletes the directories of checkpoints: the only one that does in its `output_dir`."""
        return self.is_world_process_zero() if self.share_files else self.is_local_process_zero()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        self.guard.check(self.state)
        self.state.stateful_callbacks["Progress"] = {
            "losses": self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
            "total": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
        }
        with self.written_whole(output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}") as directory:
            self.writing = directory.parent
            super()._save_checkpoint(model, trial)
        self.writing = output_dir
        if self.keeps_directories():
            checkpoints.prune(output_dir, self.diffusion.keep_checkpoints, step, self.state.log_history)
        self.guard.saved(self.state)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.writing)

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

    def save_final(self, output_dir: Path) -> None:
        """Write `checkpoint-final` in the precision of the model that was trained; of LoRA, `adapter` and the two merged."""
        if not self.model.has_adapters:
            self.model.to(self.model.stored_dtype)
            with self.written_whole(output_dir / "checkpoint-final") as directory:
                self.save_model(str(directory))
            return
        with self.written_whole(output_dir / "adapter") as directory:
            self.save_model(str(directory))
        with self.written_whole(output_dir / "checkpoint-final") as directory:
            if self.args.should_save:  # from disk, so that it is exact: in float32 once, whatever precision was trained in
                load(output_dir / "adapter", device="cpu").save(directory)

    def take_up(self, checkpoint: Path) -> None:
        """Load the weights and the history of a checkpoint at which training was complete."""
        self.model.to(self.args.device)  # where it would be shared out, it is still on the CPU
        self._load_from_checkpoint(str(checkpoint))
        if not self.is_fsdp_enabled:
            self.accelerator.prepare_model(self.model, evaluation_mode=True)  # with the autocast in which it was trained and scored
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them, except for the learning rate, which is this run's own: one that diverged is resumed with a lower one."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        scheduler, peak = self.lr_scheduler, self.args.learning_rate
        scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
        for group, shape in zip(self.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * shape(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        network = self.model.network
        if self.model.has_adapters:
            from a2d_core import lora

            lora.restore(network, resume_from_checkpoint)
            return
        state: dict[str, Any] = {}
        for file in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            state.update(safetensors.torch.load_file(file))
        loaded = set_model_state_dict(network, state, options=StateDictOptions(full_state_dict=True, strict=False))
        tied = set(network.all_tied_weights_keys)
        require(
            not loaded.unexpected_keys and set(loaded.missing_keys) <= tied,
            f"checkpoint '{resume_from_checkpoint}' does not fit the model: missing {sorted(set(loaded.missing_keys) - tied)[:3]}, "
            f"unexpected {loaded.unexpected_keys[:3]}. Resume with the model it was trained from",
        )


class LengthGroups(LengthGroupedSampler):
    """Rows of similar length together, in an order that depends on the seed and the epoch alone: a resumed run finds its place."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class Progress(TrainerCallback):
    """Takes from a checkpoint the loss since the last log, so that a run resumed between two logs logs what a straight one does."""

    def __init__(self, trainer: DiffusionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go on with the sums of the checkpoint, where there is one."""
        saved = state.stateful_callbacks.get("Progress")
        if saved is None or not self.trainer.is_in_train:  # afresh, or from a checkpoint of a complete training
            return
        losses = saved["losses"]
        own = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
        self.trainer._tr_loss += own
        self.trainer._total_loss_scalar, self.trainer._globalstep_last_logged = saved["total"], saved["logged"]


class MetricsFile(TrainerCallback):
    """Appends every logged row to `metrics.jsonl`, and prints a line each twentieth of the training, and each minute.

    The file is made anew from the restored history when training begins, so that a resumed run has each step once.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.begun, self.first, self.due, self.said = 0.0, 0, 0.0, ""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what a checkpoint remembers."""
        self.begun, self.first = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with checkpoints.told(self.path):
                self.path.write_text("".join(json.dumps(row) + "\n" for row in state.log_history))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the newest row."""
        if not state.is_world_process_zero:
            return
        row, now = {**state.log_history[-1], "max_steps": state.max_steps}, time.perf_counter()
        if "loss" in row:
            row["seconds_left"] = (now - self.begun) / max(1, row["step"] - self.first) * (state.max_steps - row["step"])
        with checkpoints.told(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "loss" not in row or now >= self.due or row["step"] % max(1, state.max_steps // 20) < args.logging_steps:
            self.due = now + 60
            self._say(row, now - self.begun)

    def _say(self, row: dict[str, Any], seconds: float) -> None:
        """Print a row for a person; an evaluation that is repeated at the end is no news."""
        line = f"step {row['step']:,}/{row['max_steps']:,}  "
        if "loss" in row:
            elapsed, left = (timedelta(seconds=round(s)) for s in (seconds, row["seconds_left"]))
            line += f"{row['step'] / row['max_steps']:4.0%}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  "
            line += f"{elapsed} elapsed, {left} left"
        elif "eval_nelbo" in row:
            error = f" ± {row['eval_nelbo_stderr']:.4f}" if "eval_nelbo_stderr" in row else ""  # of one row there is none
            line += f"held-out NELBO {row['eval_nelbo']:.4f}{error} nats per token"
        else:
            line += f"trained in {timedelta(seconds=round(seconds))}, mean loss {row['train_loss']:.4f}"
        if line != self.said:
            print(line, flush=True)
        self.said = line if "eval_nelbo" in row else self.said


def training_arguments(config: TrainConfig, output_dir: Path, seed: int) -> TrainingArguments:
    """The transformers form of a `TrainConfig`.

    It differs from the defaults of transformers in: no integration reports (tracking reads metrics.jsonl), no progress bar
    (`MetricsFile` prints), no column is dropped, and a NaN loss is seen rather than filtered.
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
        bf16=computes_in_bfloat16(config),
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
        report_to="none",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        accelerator_config={"dispatch_batches": False},  # each process reads a stream itself and keeps its share of every batch
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # one process has one GPU: Trainer would wrap several visible ones in DataParallel
    return arguments


def computes_in_bfloat16(config: TrainConfig) -> bool:
    """Whether training under `config` multiplies in bfloat16 on this machine."""
    return config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16())


def corrupt(
    config: TrainConfig, seed: int, step: int, rows_B: Tensor, chunk_BT: Tensor, is_maskable_BT: Tensor, *, total_rows: int, chunks: int
) -> tuple[Tensor, Tensor]:
    """The times t_KBT and the masks is_masked_KBT of the given global rows of one optimizer step, as the configuration draws them.

    `chunk_BT` says which slots of a row share a time; `chunks` is their largest number in any row of the step.
    """
    views = config.views // 2 if config.complementary else config.views
    t_max = 1 - config.t_min if config.complementary else config.t_max
    t_KBN = noise.draw_t(
        config.t_draws, seed, step, rows_B, total_rows=total_rows, blocks=chunks, views=views, t_min=config.t_min, t_max=t_max
    )
    t_KBT = t_KBN.gather(2, chunk_BT.expand(views, -1, -1))
    is_masked_KBT = noise.draw_mask(seed, step, rows_B, 1 - noise.alpha(t_KBT, config.schedule), is_maskable_BT)
    if config.complementary:  # a complement at t is a mask at 1 - t, and has that time's weight
        return torch.cat([t_KBT, 1 - t_KBT]), torch.cat([is_masked_KBT, is_maskable_BT & ~is_masked_KBT])
    return t_KBT, is_masked_KBT


def _is_complete(checkpoint: Path, config: TrainConfig) -> bool:
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    return config.max_steps in (-1, state["max_steps"]) and state["global_step"] >= state["max_steps"]


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
