"""Quantize tiny weights of many architectures, each in a process of its own, forked after the slow imports.

A program for llmcompressor's environment, `python bench/compress.py WORKER`, with the file of
`cogpress.quantize.worker`. It reads the path of a job a line, and answers each with its exit code when it has ended;
`stderr` beside the job tells why.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

PATIENCE = 180
"""Seconds that one job may take."""


def main() -> None:
    """Do each job that is named on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    import llmcompressor.modifiers.gptq
    import llmcompressor.modifiers.transform.awq  # noqa: F401 - before the fork, so that they are imported once

    worker = runpy.run_path(sys.argv[1])["main"]
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(worker, Path(line.strip())))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        print(process.exitcode, file=answers, flush=True)


def _run(worker: Callable[[Path], None], job: Path) -> None:
    with job.with_name("stderr").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    worker(job)


if __name__ == "__main__":
    main()
