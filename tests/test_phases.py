"""Phases in processes of their own, as on a GPU: no two models at once, and nothing is lost on the way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from cogpress import config, phases, pipeline
from cogpress.errors import CogpressError
from cogpress.weights import base
from tests import wait_until

ROOT = Path(__file__).resolve().parents[1]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def what_comes_through(number: int, *, console: Console, tick: Callable[[], object]) -> tuple[int, bool, int]:
    for _ in range(number):
        tick()
    console.print(f"[bold]ticks[/bold]: {number} of {console.width}")
    return os.getpid(), phases.run("inner", os.getpid) == os.getpid(), number


class TwoPartError(CogpressError):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def fail(how: str) -> None:
    if how == "expected":
        raise CogpressError("Set it to auto.")
    if how == "two parts":
        raise TwoPartError("Not", "portable.")
    if how == "unforeseen":
        raise ZeroDivisionError("here")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_phase_apart_prints_ticks_returns_and_fails_as_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in (True, False):
        monkeypatch.setattr(phases, "apart", lambda kept=kept: not kept)
        ticks: list[int] = []
        console = Console(file=io.StringIO(), width=44, force_terminal=True, color_system="standard")
        pid, inner_stays, number = phases.run(
            "test", what_comes_through, 3, console=console, tick=lambda to=ticks: to.append(1)
        )
        assert (pid == os.getpid(), inner_stays, number, len(ticks)) == (kept, True, 3, 3)
        assert console.file.getvalue() == (  # type: ignore[attr-defined]
            "\x1b[1mticks\x1b[0m: \x1b[1;36m3\x1b[0m of \x1b[1;36m44\x1b[0m\n"
        )
        assert kept or not alive(pid), "it has ended"
        with pytest.raises(CogpressError, match=r"^Set it to auto\.$"):
            phases.run("test", fail, "expected")
        with pytest.raises(CogpressError, match=r"^Not portable\.$"):
            phases.run("test", fail, "two parts")
        with pytest.raises(ZeroDivisionError, match="here") as caught:
            phases.run("test", fail, "unforeseen")
        assert kept or "line" in caught.value.__notes__[0]
    with pytest.raises(CogpressError, match=r"process of the test ended early, killed by SIGKILL\. .* out of memory"):
        phases.run("test", fail, "killed")


def wait_and_clean_up(folder: Path) -> None:
    try:
        (folder / "began").write_text(str(os.getpid()))
        time.sleep(600)
    finally:
        time.sleep(0.2)  # a second signal would interrupt this
        (folder / "cleaned").touch()


_PROGRAM = """
import sys
from pathlib import Path
from cogpress import cli, phases
from tests.test_phases import wait_and_clean_up
phases.apart = lambda: True
if __name__ == "__main__":
    cli.run(lambda: phases.run("test", wait_and_clean_up, Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("Ctrl-C", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_phase_ends_in_order_with_the_program_that_waits_for_it(tmp_path: Path, how: str, status: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    process = subprocess.Popen(
        [sys.executable, program, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_until((tmp_path / "began").is_file)
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # a terminal tells every process
        else:
            process.send_signal(getattr(signal, how))
        told = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == status
    assert wait_until((tmp_path / "cleaned").is_file)
    assert "Traceback" not in told
    pid = int((tmp_path / "began").read_text())
    assert wait_until(lambda: not alive(pid))


def watched(log: Path, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """A phase's work, with a line in the log for each model that it loads."""
    real = base.load
    base._product_seconds = lambda dtype: 1.0  # the compute dtype of every process is the same

    def load(*given: Any, **more: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return real(*given, **more)

    base.load = load
    return work(*arguments, **named)


@pytest.mark.train
def test_no_two_models_live_at_once_and_the_result_is_that_of_one_process(
    tiny_base: Path, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"max_steps": 2, "rank": 4, "batch_size": 4, "evaluations": 0, "learning_rate": 0.01}
    settings = config.parse({"base": {"source": str(tiny_base)}, "train": train}, "the test")
    monkeypatch.setattr(base, "_product_seconds", lambda _dtype: 1.0)
    base.compute_dtype.cache_clear()

    def build(name: str) -> tuple[pipeline.Built, str]:
        console = Console(file=io.StringIO(), width=100)
        return pipeline.build(settings, examples_file, tmp_path / name, tmp_path, console), console.file.getvalue()  # type: ignore[attr-defined]

    together, printed = build("together")
    log = tmp_path / "loads"
    real, phase_names = phases.run, []

    def run(name: str, work: Any, *arguments: Any, **named: Any) -> Any:
        loaded = log.read_text().split() if log.exists() else []
        assert not any(alive(int(pid)) for pid in loaded), f"{name} begins while a model is loaded"
        phase_names.append(name)
        return real(name, partial(watched, log, work), *arguments, **named)

    monkeypatch.setattr(phases, "run", run)
    monkeypatch.setattr(phases, "apart", lambda: True)
    monkeypatch.setattr(pipeline, "free_and_total", lambda _gpus: (80 << 30, 80 << 30))
    monkeypatch.setattr(base, "load", lambda *_, **__: pytest.fail("a model was loaded here"))
    apart, printed_apart = build("apart")
    base.compute_dtype.cache_clear()
    assert phase_names == ["training", "merge", "reference", "comparison"]
    pids = log.read_text().split()
    assert len(pids) == len(set(pids)) == 3, "the merge loads no model"
    assert not any(alive(int(pid)) for pid in pids)
    assert apart.training.train_loss == pytest.approx(together.training.train_loss, rel=1e-3)
    assert apart.merged is not None
    assert together.merged is not None
    assert apart.merged.tokens == together.merged.tokens
    assert apart.merged.reference_perplexity == pytest.approx(together.merged.reference_perplexity, rel=1e-3)
    assert apart.manifest["merge"].keys() == together.manifest["merge"].keys()
    for line in ("Validation answers", "▸ Training", "mean KL per token"):
        assert line in printed
        assert line in printed_apart
    assert (tmp_path / "apart" / "metrics.jsonl").is_file()
