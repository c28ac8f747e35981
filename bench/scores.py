"""What vLLM makes of tiny weights of many architectures: each in a process of its own, forked after the slow imports.

A program, `python -m bench.scores`, which reads the path of a folder a line and answers each with a line of JSON: the
log-probabilities of `IDS`, or the reason why there are none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from cogpress import config
from cogpress.files import read_json

IDS = [5, 6, 7, *range(40, 60)]
"""What the engines are asked to score."""

SERVE = config.Serve(dtype="float32", cpu_kv_cache_gb=1)

PATIENCE = 180
"""Seconds that one folder may take."""


def main() -> None:
    """Score with each folder that is named on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.entrypoints.llm  # before the fork, so that it is imported once

    from cogpress.engines import vllm

    vllm.prepare(SERVE)
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as scratch:
            said, made = Path(scratch, "stderr"), Path(scratch, "made")
            process = fork.Process(target=_score, args=(Path(line.strip()), said, made))
            process.start()
            process.join(PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()
            found = json.loads(made.read_text()) if made.is_file() else reason(said.read_text(errors="replace"))
        print(json.dumps(found), file=answers, flush=True)


def _score(folder: Path, said: Path, made: Path) -> None:
    """Write the log-probability of each of `IDS` after those before it, by vLLM; errors go to `said`."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    from vllm import LLM, SamplingParams

    from cogpress.engines import vllm

    quantized = "quantization_config" in read_json(folder / "config.json")
    serve = SERVE.model_copy(update={"dtype": "auto"}) if quantized else SERVE  # as quantized weights' kernels require
    options = {**vllm.options(folder, serve, 1, 0, 0, None), "distributed_executor_backend": vllm.EXECUTOR}
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    [output] = LLM(**options).generate({"prompt_token_ids": IDS}, params, use_tqdm=False)
    steps: list[Any] = list(output.prompt_logprobs or ())
    scores = [step[one].logprob if step else 0.0 for one, step in zip(IDS, steps, strict=True)]
    made.write_text(json.dumps(scores))


def reason(said: str) -> str:
    """The last error that a failed start or a failed step names: its first sentence, without details."""
    errors = re.findall(r"\b[A-Z]\w*(?:Error|Exception): +(?!Engine core)(.+)|^ +Value error, (.+)", said, re.MULTILINE)
    found = "".join(errors[-1]) if errors else "".join(said.strip().splitlines()[-1:]) or "it ended without a word"
    return re.split(r"\. |, \w+=| \(| \[type=", " ".join(found.split()))[0].replace("|", "\\|")[:160].rstrip(". ")


if __name__ == "__main__":
    main()
