"""An engine that stalls is ended; one that is busy is left alone."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cogpress import config
from cogpress.engines import base as engine
from cogpress.engines import watch
from cogpress.engines.base import DEAD, Sampling
from cogpress.errors import CogpressError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watch, "IDLE_LOOKS", 5)


@pytest.fixture
def program() -> Iterator[Callable[[str], psutil.Process]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> psutil.Process:
        made = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE)
        started.append(made)
        assert made.stdout is not None
        made.stdout.readline()
        return psutil.Process(made.pid)

    yield start
    for one in started:
        one.kill()
        one.communicate()


SLEEPS, WORKS = "import time\ntime.sleep(600)", "while True: pass"


def found(
    ask: Callable[[], Awaitable[object]], process: psutil.Process, seconds: float = 60, moves: bool = False
) -> str:
    """Why an engine of this process that answers so is ended; empty if its request ends first."""
    said: list[str] = []

    async def run() -> None:
        looks = watch.Watch(ask, lambda: [process], said.append)
        until = time.monotonic() + seconds
        with looks.request() as moved:
            while not said and time.monotonic() < until:
                await asyncio.sleep(0.05)
                if moves:
                    moved()

    asyncio.run(run())
    return "".join(said)


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    return


def test_what_does_nothing_and_answers_nothing_has_stalled(program: Callable[[str], psutil.Process]) -> None:
    assert "did nothing" in found(never, program(SLEEPS))
    stopped = program(WORKS)
    stopped.send_signal(signal.SIGSTOP)
    assert "did nothing" in found(never, stopped)


def test_what_works_has_not_stalled_until_the_limit(
    program: Callable[[str], psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = program(WORKS)
    assert found(never, works, 2) == ""
    monkeypatch.setattr(watch, "BUSY_LOOKS", 10)
    assert "did not finish a step" in found(never, works)


def test_what_answers_has_not_stalled_unless_nothing_moves(
    program: Callable[[str], psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps = program(SLEEPS)
    assert found(at_once, sleeps, 2) == ""
    monkeypatch.setattr(watch, "STUCK_LOOKS", 5)
    assert found(at_once, sleeps, 2, moves=True) == ""
    assert "no request made progress" in found(at_once, sleeps)


def test_a_blocked_event_loop_accuses_nobody(program: Callable[[str], psutil.Process]) -> None:
    sleeps = program(SLEEPS)

    async def run() -> list[str]:
        said: list[str] = []
        with watch.Watch(lambda: asyncio.sleep(0.3), lambda: [sleeps], said.append).request():
            await asyncio.sleep(0.1)
            time.sleep(2)
            await asyncio.sleep(0.5)
        return said

    assert asyncio.run(run()) == []


def test_a_step_of_the_reference_engine_that_hangs_ends_it(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes in this very process, which goes on."""
    monkeypatch.setattr(watch, "WORKING_SHARE", 0.5)
    monkeypatch.setattr(watch, "IDLE_LOOKS", 15)  # a busy machine lets a step wait
    made: Any = engine.load(tiny_base, config.Serve(engine="transformers"), 4, 0)
    step, hangs, released = made._step, threading.Event(), threading.Event()

    def computed(*given: Any) -> Any:
        if hangs.is_set():
            released.wait(600)
        return step(*given)

    monkeypatch.setattr(made, "_step", computed)

    async def run() -> list[Any]:
        async def ask() -> int:
            return sum([delta.tokens async for delta in made.generate([1, 2, 3], Sampling(max_tokens=8, min_tokens=8))])

        assert await asyncio.gather(ask(), ask()) == [8, 8]
        hangs.set()
        answers = await asyncio.gather(*(ask() for _ in range(3)), made.score([1, 2, 3]), return_exceptions=True)
        assert made.dead
        with pytest.raises(CogpressError, match="has stopped"):
            await ask()
        return answers

    assert [str(answer) for answer in asyncio.run(run())] == [DEAD] * 4
    made.shutdown()
    assert made._thread._thread.is_alive()
    assert made._thread._thread.daemon, "a program ends although the step does not"
    released.set()
