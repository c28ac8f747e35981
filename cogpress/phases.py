"""Phases that load a model: on a GPU each in a process of its own, whose end is all that surely frees the memory.

What PyTorch's allocator keeps for itself, CUDA's context and whatever a library still refers to would be missing in the
next phase, and vLLM asks for nine tenths of what is free. On a CPU another process costs seconds of imports, and what
nobody refers to is free.
"""

from __future__ import annotations

import ctypes
import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from rich.console import Console

from cogpress.errors import CogpressError

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""For a process to end in order before it is killed."""

Meter = Callable[[], AbstractContextManager[list[int]]]
"""Measures the block that it is given to, in a list's only number, which is there when the block ends."""

meter: Meter | None = None
"""Where set, a function of a module's top level: each phase runs in a process of its own and is measured."""

measured: list[tuple[str, int]] = []
"""What `meter` found, by phase."""

_inside = False
"""Whether this is the process of a phase, where what it calls stays."""


def apart() -> bool:
    """Whether phases run in processes of their own: where they use a GPU."""
    import torch

    return torch.cuda.is_available()


def run(
    name: str,
    work: Callable[..., T],
    *arguments: Any,
    console: Console | None = None,
    tick: Callable[[], object] | None = None,
) -> T:
    """Call a function that loads a model; when this returns, the model's memory is free.

    The function must keep no reference to the model. `name`, its arguments and its result are pickled where it runs in
    a process of its own, which prints, ticks and fails here, and ends with this one or when this one is interrupted.

    Args:
        name: of the phase, for an error.
        work: the function, of a module's top level.
        arguments: what it is called with.
        console: passed on to it by name, where given.
        tick: passed on to it by name, where given; it calls this for each item of work.

    Raises:
        CogpressError: the process was ended from outside.
        Exception: whatever the function raises.
    """
    if _inside or not (apart() or meter):
        given = {"console": console, "tick": tick}
        try:
            return work(*arguments, **{key: value for key, value in given.items() if value is not None})
        finally:
            gc.collect()
            give_back()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_serve,
        args=(theirs, work, arguments, console and _settings(console), tick is not None, meter),
        name=name,
    )
    # Ctrl-C reaches every process of a terminal. This one decides what it means, and tells that one by SIGTERM.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
    try:
        found = _follow(name, ours, process, console, tick)
        process.join(GRACE_SECONDS)
    finally:
        _end(process)
        ours.close()
    if isinstance(found, BaseException):
        raise found
    return found.value  # type: ignore[no-any-return]


def give_back() -> None:
    """Give freed memory back to the system, where the C library can.

    Batches of many lengths leave gaps between what stays, which nothing fits into again: after 100 steps of the
    embedded model's training on a CPU the heap had 2 GB of them beside 1 GB in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Result:
    """What a phase returned, which may itself be an exception."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _follow(
    name: str, pipe: Connection, process: SpawnProcess, console: Console | None, tick: Callable[[], object] | None
) -> Any:
    """Print and tick what a phase sends until it has a result or an error, which is returned."""
    while True:
        try:
            kind, content = pipe.recv()
        except EOFError:
            process.join(GRACE_SECONDS)
            status = process.exitcode or 0
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
            memory = " The machine may have run out of memory." if status == -signal.SIGKILL else ""
            raise CogpressError(f"The process of the {name} ended early, {how}.{memory}") from None
        if kind == "print" and console is not None:
            console.file.write(content)
            console.file.flush()
        elif kind == "tick" and tick is not None:
            tick()
        elif kind == "measured":
            measured.append((name, content))
        elif kind == "result":
            return _Result(content)
        elif kind == "error":
            return content


def _end(process: SpawnProcess) -> None:
    if process.is_alive():
        process.terminate()
        process.join(GRACE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def _settings(console: Console) -> dict[str, Any]:
    """What makes another console print as this one does."""
    return {
        "force_terminal": console.is_terminal,
        "color_system": console.color_system,
        "width": console.width,
        "height": console.height,
        "quiet": console.quiet,
        "soft_wrap": console.soft_wrap,
        "no_color": console.no_color,
    }


class _Pipe(io.TextIOBase):
    """A file whose text goes to the process that waits."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        self._send = send

    def write(self, text: str) -> int:
        self._send("print", text)
        return len(text)

    def writable(self) -> bool:
        return True


def _serve(
    pipe: Connection,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    settings: dict[str, Any] | None,
    ticks: bool,
    meter: Meter | None,
) -> None:
    """The process of a phase."""
    global _inside
    _inside = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _terminated)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(kind: str, content: Any = None) -> None:
        with lock:  # a progress bar prints from a thread of its own
            pipe.send((kind, content))

    given: dict[str, Any] = {}
    if settings is not None:
        given["console"] = Console(file=_Pipe(send), **settings)  # type: ignore[arg-type]
    if ticks:
        given["tick"] = partial(send, "tick")
    try:
        with nullcontext() if meter is None else meter() as found:
            result = work(*arguments, **given)
        if found is not None:
            send("measured", found[0])
        send("result", result)
    except Exception as error:  # noqa: BLE001 - raised again where the phase was called
        send("error", _portable(error))


def _portable(error: Exception) -> Exception:
    """An error as it can be pickled; one that nobody expected with the place where it was raised."""
    expected = isinstance(error, CogpressError)
    if not expected:
        error.add_note("In the process of the phase:\n" + "".join(traceback.format_exception(error)))
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made a line ago
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # noqa: BLE001 - whatever it is, it cannot be pickled
        pass
    made = CogpressError(str(error)) if expected else RuntimeError(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", []):
        made.add_note(note)
    return made


def _terminated(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that nothing interrupts what cleans up
    sys.exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    """End this process in order once the one that waits for it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
