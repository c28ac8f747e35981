"""The training loop: transformers' Trainer with batches of like length, and a record of each step."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from cogpress import phases
from cogpress.errors import CogpressError
from cogpress.prompts import Row

TRIM_STEPS = 10
"""Steps after which freed memory is given back."""

_WINDOW = 32
"""Batches sorted by length together: enough to leave little padding, few enough to stay random."""


class Rows(Dataset[Row]):
    """Tokenized examples as a PyTorch dataset."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class LengthGroupedSampler(Sampler[int]):
    """Row indices, shuffled anew each epoch, with rows of like length in the same batch to save padding.

    Few rows are only shuffled: sorted by length all at once, batches of similar rows teach less at the beginning
    (docs/measurements.md).

    The order depends on the seed and the epoch alone, not on the global random state, so a resumed run sees the same
    batches as an uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        rows = random.permutation(len(self.lengths))
        window = self.batch_size * _WINDOW
        if len(rows) < 2 * window:
            yield from rows.tolist()
            return
        batches: list[np.ndarray] = []
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches.extend(part[at : at + self.batch_size] for at in range(0, len(part), self.batch_size))
        # A short batch in the middle would shift every batch after it, so it goes last.
        short = [batch for batch in batches if len(batch) < self.batch_size]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        for at in random.permutation(len(full)):
            yield from full[at].tolist()
        for batch in short:
            yield from batch.tolist()


class ObjectiveTrainer(Trainer):
    """transformers' Trainer with batches of like length and the loss of an objective.

    The objective takes a model and a batch; it gives the summed loss and how many tokens it is the sum of.
    """

    def __init__(self, *, objective: Callable[[Any, dict[str, Any]], tuple[torch.Tensor, int]], **kwargs: Any) -> None:
        self.objective = objective
        self.tokens_seen = 0
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(row.input_ids) for row in train_dataset or self.train_dataset]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """transformers' schedule, but the first step learns: theirs warms up from a rate of 0 in step 1."""
        made = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and isinstance(made, torch.optim.lr_scheduler.LambdaLR):
            made.lr_lambdas = [_warmed_up(share, warmup) for share in made.lr_lambdas]
            if made.last_epoch == 0:  # a resumed run takes its rate from the checkpoint
                for group, base, share in zip(made.optimizer.param_groups, made.base_lrs, made.lr_lambdas, strict=True):
                    group["lr"] = base * share(0)
                made._last_lr = [group["lr"] for group in made.optimizer.param_groups]  # what is logged
        return made

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss per token over the whole batch, accumulated and on all devices."""
        loss, count = self.objective(model, inputs)
        self.tokens_seen += inputs["tokens"]
        if num_items_in_batch is None:
            return loss / count
        # Trainer averages gradients over devices, while the count is of all of them.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per token of the validation rows, weighted by tokens and not by batches."""
        loader = self.get_eval_dataloader(eval_dataset)
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in loader:
                loss, tokens = self.objective(self.model, self._prepare_inputs(batch))
                sums = self.accelerator.gather_for_metrics(torch.stack([loss.detach(), loss.new_tensor(tokens)])[None])
                total += sums[:, 0].sum().item()
                count += int(sums[:, 1].sum().item())
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        self.log(metrics)
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics


def _warmed_up(share: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """A schedule that rises over its first `warmup` steps to its peak, and not from 0."""
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else share(step)


def memory_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes): the GPU's where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Recorder(TrainerCallback):
    """Shows progress and writes `metrics.jsonl`, one object a step; ends a training whose loss is no number.

    Tokens per second count no padding and no time spent in evaluation or on checkpoints.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.console = console
        self.trainer: ObjectiveTrainer
        self.seconds = 0.0
        self.tokens = 0
        self._validation = math.nan
        self._validated = -1
        self._started = 0.0
        self._tokens_before = 0
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        rows = _drop_after(self.path, state.global_step)
        self._validated = max((row["step"] for row in rows if "validation_loss" in row), default=-1)
        if kept := [row for row in rows if "loss" in row]:  # a resumed run counts on from where it was
            self.seconds, self.tokens = kept[-1]["seconds"], kept[-1]["tokens"]
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("  training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()
        self._tokens_before = self.trainer.tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the loss, which is logged next, waits for the device anyway
        self.seconds += time.perf_counter() - self._started
        self.tokens += self.trainer.tokens_seen - self._tokens_before
        if state.global_step % TRIM_STEPS == 0:
            phases.give_back()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            self._step(state, logs)
        elif "eval_loss" in logs:
            self._validation = logs["eval_loss"]
            if state.global_step > self._validated:  # a run that resumes at its end validates that step again
                self._validated = state.global_step
                self._write({"step": state.global_step, "validation_loss": logs["eval_loss"]})
        for name, what in (("loss", "loss"), ("eval_loss", "validation loss")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise CogpressError(
                    f"The {what} is {logs[name]} at step {state.global_step}: the training diverged, and ends here. "
                    "Start over with --fresh and a third of train.learning_rate, or a longer train.warmup_share."
                )

    def _step(self, state: Any, logs: dict[str, float]) -> None:
        speed = self.tokens / self.seconds if self.seconds else 0.0
        self._write(
            {
                "step": state.global_step,
                "epoch": round(state.epoch or 0.0, 4),
                "loss": logs["loss"],
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "seconds": round(self.seconds, 3),
                "tokens": self.tokens,
                "tokens_per_second": round(speed, 1),
                "memory_gb": round(memory_gb(), 2),
            }
        )
        validation = "" if math.isnan(self._validation) else f"  validation {self._validation:.4f}"
        numbers = f"loss {logs['loss']:.4f}{validation}  {speed:.0f} tok/s  {memory_gb():.1f} GB"
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, numbers=numbers)
        elif state.global_step % max(1, state.max_steps // 10) == 0:
            left = (state.max_steps - state.global_step) * self.seconds / max(1, state.global_step)
            self.console.print(f"  step {state.global_step}/{state.max_steps}  {numbers}  {left:.0f} s left")

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal; also after an interruption."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by an interruption is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was recorded after the checkpoint to resume from. Returns what is kept."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows
