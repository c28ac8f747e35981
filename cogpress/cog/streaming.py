"""A workaround for coglet: streaming with concurrency and cancellation in Cog's runtime.

Three facts about coglet 0.23.1, each tested against the real runtime in `tests/cog/test_streaming.py`:

1. It collects an async generator to the end before it sends anything, so an `async def run()` that yields does not
   stream. A *sync* generator streams, but a runner whose `run()` is one serves one prediction at a time.
2. `async def run()` may *return* a sync generator, which then streams, many at once, each drained in a thread.
   So a task on the event loop, the pump, produces the tokens, and a queue brings them to the thread.
3. A canceled prediction or a dropped connection calls `cancel()` on the future that
   `asyncio.run_coroutine_threadsafe` returned for `run()`. Here that future is done long before, so nothing would
   stop. `install()` gives coglet futures whose `cancel()` also reaches the pump.

When a new Cog streams async generators itself, the tests of these facts fail and this module can go.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import queue
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from importlib import metadata
from typing import Any, NamedTuple

from cogpress.cog.reasons import plain_errors
from cogpress.errors import CogpressError

COGLET = "0.23.1"
"""The coglet that streams as described here; Cog pins its own version in the image, but not coglet's."""

PIN = f"uv pip install --no-deps --break-system-packages coglet=={COGLET}"
"""The command of `build.run` that installs it."""

_pumps: contextvars.ContextVar[list[asyncio.Task[None]]] = contextvars.ContextVar("cogpress_pumps")
"""The pumps of the running prediction."""


class _Ended(NamedTuple):
    """The last item of a queue: how the pump ended."""

    error: BaseException | None


def install() -> None:
    """Make `cancel()` on the futures of `asyncio.run_coroutine_threadsafe` reach the pumps; twice does no harm.

    Raises:
        CogpressError: another coglet is installed, with which streams or cancellations could be lost silently.
    """
    found = metadata.version("coglet")
    if found != COGLET:
        raise CogpressError(
            f"coglet {found} is installed, but streaming is tested with coglet {COGLET}. In an image, add "
            f"`{PIN}` to build.run in cog.yaml and push again; elsewhere, run scripts/setup."
        )
    original: Callable[..., concurrent.futures.Future[Any]] = asyncio.run_coroutine_threadsafe
    if getattr(original, "reaches_pumps", False):
        return

    @functools.wraps(original)
    def run_coroutine_threadsafe(
        coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop
    ) -> concurrent.futures.Future[Any]:
        pumps: list[asyncio.Task[None]] = []

        async def tracked() -> Any:
            _pumps.set(pumps)
            with plain_errors():
                return await coroutine

        future = original(tracked(), loop)
        cancel_coroutine = future.cancel

        def cancel() -> bool:
            for pump in pumps:
                loop.call_soon_threadsafe(pump.cancel)
            return cancel_coroutine()

        future.cancel = cancel  # type: ignore[method-assign]
        return future

    run_coroutine_threadsafe.reaches_pumps = True  # type: ignore[attr-defined]
    asyncio.run_coroutine_threadsafe = run_coroutine_threadsafe  # type: ignore[assignment]


def stream(chunks: AsyncIterator[str]) -> Iterator[str]:
    """Start draining `chunks` on the running event loop; return a sync generator of the same chunks.

    Call it inside `async def run()` and return its result. The generator raises the source's exception, or
    `asyncio.CancelledError` after a cancellation; the source is closed in every case.
    """
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def pump() -> None:
        try:
            async for chunk in chunks:
                # At the end of the loop's turn: one step of the engine brings a chunk for every stream, and a thread
                # woken earlier would only wait for the interpreter lock, which the loop still holds.
                loop.call_soon(items.put, chunk)
        finally:
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()

    def ended(task: asyncio.Task[None]) -> None:
        # Also for a task canceled before its first step, so that the thread below never waits forever.
        items.put(_Ended(asyncio.CancelledError() if task.cancelled() else task.exception()))

    loop = asyncio.get_running_loop()
    task = loop.create_task(pump())
    task.add_done_callback(ended)
    _pumps.get([]).append(task)

    def drain() -> Iterator[str]:
        # The event loop keeps only weak references to its tasks: hold one while it is drained.
        held = task
        while not isinstance(item := items.get(), _Ended):
            yield item
        del held
        if item.error is not None:
            with plain_errors():
                raise item.error

    return drain()
