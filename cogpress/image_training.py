"""A training that Cog asks for, in a process of its own: the runtime's event loop stays free, and a cancel ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import cogpress
from cogpress.cog.process import end_family
from cogpress.cog.reasons import plain_errors
from cogpress.errors import CogpressError

GRACE_SECONDS = 5.0
"""For a canceled training to end in order before it is killed."""


async def run(root: Path, inputs: dict[str, Any]) -> Path:
    """Train as `pipeline.from_inputs` does and return the tar; what the training prints is printed here.

    A cancellation ends the process and all that it started. The tar appears whole or not at all.

    Args:
        root: the project's folder.
        inputs: by the names that `train.py` gives them.

    Raises:
        CogpressError: the training failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # Cog's runtime has the project on its path, but not in the variable that a new interpreter reads.
        paths = [str(Path(cogpress.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-m", "cogpress.image_training"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            job = {"root": str(root), "inputs": inputs, "result": str(result)}
            # The pipe stays open: that it closes tells the process that this one was killed.
            with contextlib.suppress(BrokenPipeError):  # it ended already, and its status says how
                process.stdin.write(json.dumps(job, default=str) + "\n")
                process.stdin.flush()
            # Printed by this task, not by the thread that reads: the runtime gives a line to the task's training.
            while line := await asyncio.to_thread(process.stdout.readline):
                print(line, end="", flush=True)
            status = await asyncio.to_thread(process.wait)
        finally:
            if process.poll() is None:
                # In a thread, which goes on when this task is canceled once more.
                await asyncio.shield(asyncio.to_thread(end_family, process, GRACE_SECONDS))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        with plain_errors():
            return _tar(result, status)


def _tar(result: Path, status: int) -> Path:
    try:
        told = json.loads(result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        memory = " The machine may have run out of memory: lower batch_size or max_length." if status == -9 else ""
        raise CogpressError(f"The training's process ended early, {how}. See its log.{memory}") from None
    if "error" in told:
        raise CogpressError(told["error"])
    return Path(told["tar"])


def main() -> None:
    """Read one job from stdin, train, and write the tar's path or the error to the job's result file."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from cogpress import pipeline

    root = Path(job["root"])
    try:
        built = pipeline.from_inputs(root, job["inputs"], run=pipeline.new_run(root), tar=True)
        told = {"tar": str(built.tar)}
    except pipeline.UnfitError as error:
        # A failed training returns nothing, and this one was paid for; scripts/verify and preflight refuse the weights.
        print(f"NOT FIT TO BE SERVED: {error} The adapter is in the tar, beside them.", flush=True)
        told = {"tar": str(error.built.tar)}
    except CogpressError as error:
        told = {"error": str(error)}
    except Exception:  # noqa: BLE001 - whatever it is, the runtime reports it
        traceback.print_exc()
        told = {"error": "The training failed in a way that nobody foresaw. The end of its log says where."}
    Path(job["result"]).write_text(json.dumps(told), encoding="utf-8")


def _end_with_parent() -> None:
    """Kill this session once the process that started it is gone."""
    os.read(0, 1)  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
