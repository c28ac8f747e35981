"""End a container whose model has stopped working, so that its platform starts another.

Cog's runtime outlives its worker and its engine, and refuses every prediction from then on. This file is also the
program that watches it, which imports nothing of this package: it has to outlive the worker too.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time

WATCHED = "COGPRESS_WATCHED"
"""Set where something else watches the server, as `process.Server` does."""

STOPPED = ("UNHEALTHY", "DEFUNCT")
"""Statuses of a server that worked once. Of one that never did, the platform wants to hear the reason."""


def watch(seconds: float = 5.0, looks: int = 6) -> None:
    """Watch the runtime from a separate process, once the runner is set up.

    Args:
        seconds: between health checks.
        looks: the number of consecutive checks that must fail before the runtime is killed.
    """
    if not os.environ.get(WATCHED):
        runtime, port = str(os.getppid()), os.environ.get("PORT", "5000")
        subprocess.Popen(
            [sys.executable, "-I", __file__, runtime, port, str(seconds), str(looks)], stdin=subprocess.DEVNULL
        )


def _status(port: int) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health-check")
        return str(json.loads(connection.getresponse().read())["status"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()


def _main(runtime: int, port: int, seconds: float, looks: int) -> None:
    stopped = 0
    try:
        while stopped < looks:
            time.sleep(seconds)
            os.kill(runtime, 0)
            stopped = stopped + 1 if _status(port) in STOPPED else 0
        os.kill(runtime, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended by itself


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
