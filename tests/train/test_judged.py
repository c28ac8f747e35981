"""What is measured is judged: the first step learns, and a run that learnt nothing or diverged is no success.

transformers' trainer takes seconds to import, so the tests that need it import it themselves.
"""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from cogpress import config, pipeline
from cogpress.errors import CogpressError
from cogpress.prompts import Row
from cogpress.train import answers
from cogpress.train import run as training
from cogpress.train.arguments import arguments, too_few
from cogpress.train.objective import Collator
from cogpress.verify.distributions import Divergence

if TYPE_CHECKING:
    from cogpress.train.loop import ObjectiveTrainer, Recorder


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (2, 0.05), (20, 0.2), (20, 0.0)])
def test_the_first_step_learns(tmp_path: Path, schedule: str, steps: int, warmup: float) -> None:
    from cogpress.train.loop import ObjectiveTrainer, Rows

    settings = config.Train.model_validate(
        {"optimizer": "adamw", "schedule": schedule, "learning_rate": 0.1, "warmup_share": warmup}
    )
    model = torch.nn.Linear(2, 2)
    trainer = ObjectiveTrainer(
        objective=lambda model, batch: (torch.zeros(()), 1),
        model=model,
        args=arguments(settings, tmp_path, 8, False, torch.float32),
        train_dataset=Rows([Row([1], [1])]),
    )
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rising = math.ceil(steps * warmup)
    assert all(rate > 0 for rate in rates)
    assert rates[: rising + 1] == pytest.approx([0.1 * (n + 1) / (rising + 1) for n in range(min(steps, rising + 1))])


def test_too_few_rows_are_said_with_what_to_set() -> None:
    said = too_few(config.Train(), 6)
    assert said is not None
    assert said.startswith("6 training examples in batches of 8 make a single optimizer step")
    assert "train.epochs" in said
    assert too_few(config.Train(epochs=2), 6) is None
    assert too_few(config.Train(max_steps=1), 6) is None
    assert too_few(config.Train(), 9) is None


def test_an_adapter_of_zeros_is_no_success() -> None:
    model = torch.nn.Module()
    model.lora_B = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.lora_B.weight)
    with pytest.raises(CogpressError, match=r"still all zero after 1 steps.*train\.learning_rate"):
        training.check_learnt(model, 1)
    torch.nn.init.ones_(model.lora_B.weight)
    training.check_learnt(model, 1)


def recorder(path: Path) -> Recorder:
    from cogpress.train.loop import Recorder

    made = Recorder(path, Console(quiet=True))
    made.on_train_begin(None, SimpleNamespace(global_step=5, max_steps=9), None)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("loss", math.nan), ("loss", math.inf), ("eval_loss", math.nan)])
def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, name: str, value: float) -> None:
    state: Any = SimpleNamespace(global_step=5, max_steps=200, epoch=0.1)
    with pytest.raises(CogpressError, match=r"loss is (nan|inf) at step 5: .*train\.learning_rate"):
        recorder(tmp_path / "metrics.jsonl").on_log(None, state, None, {name: value})
    assert "step" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_the_last_validation_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "validation_loss": 1.0}\n')
    resumed = recorder(path)
    for step in (5, 9, 9):
        resumed.on_log(None, SimpleNamespace(global_step=step), None, {"eval_loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 9]


def toy(folder: Path, *, steps: int, nan_at: int = 0, resume: str | None = None) -> ObjectiveTrainer:
    """Real training of two numbers."""
    from cogpress.train.loop import ObjectiveTrainer, Recorder, Rows

    calls = iter(range(1, 99))

    def objective(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        loss = model(batch["attention_mask"].float()[:, :1]).square().sum()
        return (loss * math.nan if next(calls) == nan_at else loss), 1

    settings = config.Train(optimizer="adamw", learning_rate=0.1, warmup_share=0.5, max_steps=steps, batch_size=1)
    torch.manual_seed(0)
    recorder = Recorder(folder / "metrics.jsonl", Console(quiet=True))
    trainer = ObjectiveTrainer(
        objective=objective,
        model=torch.nn.Linear(1, 1),
        args=arguments(settings, folder, 4, False, torch.float32),
        train_dataset=Rows([Row([1, 2], [1, 2])] * 4),
        data_collator=Collator(0),
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    training.quiet(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rates(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


@pytest.mark.slow
def test_rates_are_those_of_the_schedule_also_after_an_interruption(tmp_path: Path) -> None:
    toy(tmp_path, steps=8)
    whole = rates(tmp_path)
    assert whole[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(rate > 0 for rate in whole)
    checkpoints = sorted((tmp_path / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-7", "checkpoint-8"]
    toy(tmp_path, steps=8, resume=str(checkpoints[0]))
    assert rates(tmp_path) == whole


@pytest.mark.slow
def test_a_real_training_ends_at_the_step_whose_loss_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="loss is nan at step 3"):
        toy(tmp_path, steps=8, nan_at=3)
    assert len(rates(tmp_path)) == 3


def built(folder: Path, mean_kl: float, naive: float | None = None, onto: str = "dequantized") -> pipeline.Built:
    def divergence(value: float) -> Divergence:
        return Divergence(value, value, 1.0, 1.0, 1.0, 9)

    facts = {"quantization": "nf4", "merge": {"onto": onto}}
    result = training.Result(folder / "adapter", 9, 1.0, 1.0, 1.0, 9, 1.0, 1.0)
    usual = None if naive is None else divergence(naive)
    return pipeline.Built(folder, folder / "weights", facts, result, divergence(mean_kl), usual)


def test_a_merge_over_its_limit_or_worse_than_the_usual_one_is_no_success(tmp_path: Path) -> None:
    def judged(*measured: Any, **settings: Any) -> None:
        pipeline.judge(config.Config.model_validate(settings), built(tmp_path, *measured), operator.eq)

    judged(0.0029)
    judged(0.0029, 0.0028)
    judged(0.07, 0.07, "original", merge="original")
    judged(0.02, verify={"mean_kl": 0.03})
    for value in (0.004, math.nan, math.inf):
        with pytest.raises(CogpressError, match=rf"mean KL {value}.*at most 0\.003 passes.*stay in {tmp_path}"):
            judged(value)
    with pytest.raises(CogpressError, match="Set merge: dequantized"):
        judged(0.09, 0.09, "original", merge="original")
    with pytest.raises(CogpressError, match=r"worse than the usual one: mean KL 0\.00200.*against 0\.00010"):
        judged(0.002, 0.0001)


def test_no_right_answer_where_the_base_gives_some_is_no_success(tmp_path: Path) -> None:
    made = built(tmp_path, 0.0)
    for base, tuned, passes in (("yes", "no", False), ("yes", "yes", True), ("no", "no", True), ("no", "yes", True)):
        rows = [{"prompt": "?", "expected": "yes", "base": base, "tuned": tuned}]
        (tmp_path / "answers.json").write_text(json.dumps(rows))
        if passes:
            pipeline.judge(config.Config(), made, operator.eq)
            continue
        with pytest.raises(CogpressError, match=r"Of 1 validation answers the tuned model gives none as expected"):
            pipeline.judge(config.Config(), made, operator.eq)


def test_few_wrong_answers_are_not_enough_to_conclude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned model's first right answer is the ninth."""
    asked: list[int] = []

    def ask(_model: Any, _tokenizer: Any, examples: Any) -> list[dict[str, str]]:
        asked.extend(example.number for example in examples)
        return [
            {"prompt": "?", "expected": "yes", "base": "yes", "tuned": "yes" if example.number == 9 else "no"}
            for example in examples
        ]

    monkeypatch.setattr(answers, "_ask", ask)
    examples: Any = [SimpleNamespace(number=number, messages=[1]) for number in range(40)]
    found = answers.compare(None, None, examples, tmp_path, Console(quiet=True), score=operator.eq)  # type: ignore[arg-type]
    assert asked == list(range(32))
    assert json.loads((tmp_path / "answers.json").read_text()) == found
    assert not answers.fails(found, operator.eq)
    asked.clear()
    answers.compare(None, None, examples[6:], tmp_path, Console(quiet=True), score=operator.eq)  # type: ignore[arg-type]
    assert asked == [6, 7, 8, 9], "a right answer among the first is enough"
    assert not answers.fails([found[0]], lambda expected, answer: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not answers.compare(None, None, [], tmp_path, Console(quiet=True))  # type: ignore[arg-type]
    assert not (tmp_path / "answers.json").exists()
