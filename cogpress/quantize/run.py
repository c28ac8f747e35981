"""Quantize weights: one folder for each scheme, made by llmcompressor in an environment of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cogpress.cli import step
from cogpress.data import prepare
from cogpress.errors import CogpressError
from cogpress.files import new_folder, read_json, sha256, write_json
from cogpress.quantize import worker as compress
from cogpress.quantize.calibrate import Source, choose_rows
from cogpress.quantize.progress import Progress
from cogpress.quantize.schemes import (
    SCHEMES,
    Scheme,
    caution,
    compute_capability,
    group_size,
    linear_widths,
    refuse_here,
    smoothing,
    why_group,
)
from cogpress.setup.environment import QUANTIZE, Environment, clean_environment
from cogpress.weights import manifest
from cogpress.weights.filenames import DRAFT, VERIFICATION_PAGE, copy_serving_files

SAMPLES = {"cpu": 128, "gpu": 256}
"""Examples to calibrate with. Each takes half a second on two cores, and next to nothing on a GPU."""


@dataclass(frozen=True)
class Quantized:
    """A finished folder of quantized weights."""

    scheme: str
    folder: Path
    facts: dict[str, Any]
    reused: bool


def quantize(
    root: Path,
    source: Source,
    schemes: Sequence[str],
    prepared: Callable[[], prepare.Prepared],
    console: Console,
    *,
    out: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> dict[str, Quantized]:
    """Make a folder of weights for each scheme, `weights-SCHEME`; a finished one made in the same way is reused.

    Args:
        root: the project's folder, in which llmcompressor's environment is made at first use.
        source: the weights.
        schemes: names in `SCHEMES`.
        prepared: gives the run's examples; called where a scheme calibrates.
        console: where progress is shown.
        out: the folder that the folders are made in; the run's where not given.
        samples: examples to calibrate with; `SAMPLES` where not given.
        seed: chooses them.
        fresh: make again what is there.

    Raises:
        CogpressError: this machine or this model does not support a scheme, or llmcompressor failed.
    """
    capability = compute_capability()
    refuse_here(schemes, capability)
    environment = Environment(root, QUANTIZE)
    kind = "cpu" if capability is None else "gpu"
    widths = linear_widths(source.folder)
    if any(SCHEMES[name].grouped for name in schemes):
        group_size(widths)  # refuses before the examples are read
    for name in schemes:
        if told := caution(name, capability):
            console.print(f"  Note: {told}")
    rows: list[list[int]] = []
    if any(SCHEMES[name].algorithm != "none" for name in schemes):
        rows = choose_rows(prepared(), samples or SAMPLES[kind], seed)
    out = out or source.run
    packages = environment.digest(kind)
    plans = [_plan(source, SCHEMES[name], widths, rows, packages, out / f"weights-{name}") for name in schemes]
    finished = {} if fresh else {plan.scheme.name: done for plan in plans if (done := _finished(plan))}
    for done in finished.values():
        console.print(f"  {done.folder} reused: it was made from the same weights in the same way")
    todo = [plan for plan in plans if plan.scheme.name not in finished]
    if todo:
        if not environment.ready(kind):
            environment.setup(gpu=kind == "gpu")
        finished |= _make(environment, source, todo, rows, out, console)
    return {name: finished[name] for name in schemes}


@dataclass(frozen=True)
class _Plan:
    """What is made where, in words and as manifest facts; their `key` hashes everything that decides the result."""

    scheme: Scheme
    target: Path
    about: str
    facts: dict[str, Any]


def _plan(
    source: Source, scheme: Scheme, widths: dict[str, int], rows: list[list[int]], packages: str, target: Path
) -> _Plan:
    calibrated = rows if scheme.algorithm != "none" else []
    group = group_size(widths) if scheme.grouped else None
    about = [scheme.about]
    facts = {
        "scheme": scheme.name,
        "format": scheme.preset,
        "group_size": group,
        "smoothing": smoothing(scheme, source.folder),
        "samples": len(calibrated),
        "tokens": sum(map(len, calibrated)),
        "source": manifest.fingerprint(source.folder),
    }
    decides = {
        **facts,
        "rows": calibrated,
        "files": source.facts["files"],
        "carried": _carried(source.facts),
        "worker": sha256(Path(compress.__file__)),
        "packages": packages,
    }
    facts["key"] = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    if facts["smoothing"]:
        about.append("smoothed first")
    if group is not None:
        about.append(f"groups of {group}{why_group(widths, group)}")
    if calibrated:
        about.append(f"calibrated on {facts['samples']} examples ({facts['tokens']:,} tokens)")
    return _Plan(scheme, target, ", ".join(about), facts)


def _carried(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a source's manifest that hold for the quantized weights, too."""
    own = ("format", "kind", "cogpress", "created_at", "files")
    return {name: value for name, value in facts.items() if name not in own}


def _finished(plan: _Plan) -> Quantized | None:
    facts = manifest.read(plan.target) if plan.target.is_dir() else None
    if facts is None or facts.get("compression", {}).get("key") != plan.facts["key"]:
        return None
    try:
        manifest.check(plan.target, facts)
    except CogpressError:
        return None
    return Quantized(plan.scheme.name, plan.target, facts, reused=True)


def _make(
    environment: Environment,
    source: Source,
    plans: Sequence[_Plan],
    rows: list[list[int]],
    out: Path,
    console: Console,
) -> dict[str, Quantized]:
    """Run the worker over all plans and move each result into place as soon as it is complete."""
    made: dict[str, Quantized] = {}
    out.mkdir(parents=True, exist_ok=True)
    # Beside the results, so that files move into place without being copied.
    with tempfile.TemporaryDirectory(prefix=".quantize.", dir=out) as scratch:
        raw = {plan.scheme.name: Path(scratch) / plan.scheme.name for plan in plans}
        job = {
            "source": str(source.folder.resolve()),
            "rows": rows,
            "schemes": [
                task(plan.scheme, raw[plan.scheme.name], plan.facts["group_size"], plan.facts["smoothing"])
                for plan in plans
            ],
        }
        job_file = Path(scratch) / "job.json"
        write_json(job_file, job)
        with _worker(environment, job_file, out / "quantize.log") as process:
            for plan in plans:
                with step(f"Quantize to {plan.scheme.name}", console) as say:
                    console.print(f"  {plan.about}", soft_wrap=True, highlight=False)
                    _wait(process, raw[plan.scheme.name], out / "quantize.log", plan)
                    done = _finish(plan, source, raw[plan.scheme.name])
                    facts = done.facts["compression"]
                    before, after = facts["bytes_before"], facts["bytes_after"]
                    say(f"{before / 1e6:.0f} MB became {after / 1e6:.0f} MB ({after / before:.0%})")
                made[plan.scheme.name] = done
    return made


def task(scheme: Scheme, out: Path, group: int | None, smoothing: float | None) -> dict[str, Any]:
    """One scheme of the worker's job, which `cogpress.quantize.worker.main` describes."""
    return {
        "name": scheme.name,
        "out": str(out.resolve()),
        "algorithm": scheme.algorithm,
        "preset": scheme.preset,
        "group_size": group,
        "smoothing": smoothing,
    }


@contextlib.contextmanager
def _worker(environment: Environment, job: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """llmcompressor's process, with all that it prints in `log`; ended when the block ends."""
    variables = {name: value for name, value in clean_environment(os.environ).items() if "TOKEN" not in name}
    variables |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_MININTERVAL": "1",
        # Threads wait without spinning: several times as fast while other work shares the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with log.open("wb") as output:
        # -I, so that this package's modules do not shadow others of the same name.
        process = subprocess.Popen(
            [environment.python, "-I", compress.__file__, job],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], out: Path, log: Path, plan: _Plan) -> None:
    """Wait for one scheme's result, showing progress.

    Raises:
        CogpressError: the worker ended without a result; quotes the end of its log.
    """
    label = plan.scheme.name
    progress = Progress(label)
    pace = Pace(passes=2 if plan.facts["smoothing"] else 1)
    offset = log.stat().st_size
    try:
        # The file first: a worker that ends after writing it has succeeded.
        while not (out / compress.RESULT).is_file():
            if process.poll() is not None and not (out / compress.RESULT).is_file():
                raise CogpressError(explain(label, process.returncode, log))
            progress.show(pace.told(_tail(log, offset), time.monotonic()))
            time.sleep(0.2)
    finally:
        progress.end()


class Pace:
    """llmcompressor's progress, by its own count of layers, which restarts with each pass over the model."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.number = 0
        self.layer = 0
        self.began = 0.0

    def told(self, log: str, now: float) -> str:
        """The newest count in the log, with the time left once the last pass shows how long a layer takes."""
        counted = re.findall(r"\((\d+)/(\d+)\): ", log)
        if not counted:
            return ""
        layer, total = map(int, counted[-1])
        if self.number == 0 or layer < self.layer:
            self.number, self.began = self.number + 1, now
        self.layer = layer
        text = f"layer {layer} of {total}" + (f", pass {self.number} of {self.passes}" if self.passes > 1 else "")
        if self.number < self.passes or not 3 < layer < total:
            return text
        return f"{text}, about {(now - self.began) / (layer - 1) * (total - layer + 1):.0f} s left"


def _tail(log: Path, offset: int = 0, size: int = 16384) -> str:
    """The end of what was written to the log after `offset`."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(offset, file.tell() - size))
        return file.read().decode("utf-8", errors="replace")


def explain(scheme: str, status: int, log: Path) -> str:
    """Why the worker failed, with the end of its log and the place of the rest."""
    lines = [line.rstrip() for line in re.split(r"[\r\n]", _tail(log))]
    lines = [line for line in lines if line and "it/s" not in line and "?it" not in line]
    end = "\n".join(f"  {line[:300]}" for line in lines[-8:])
    cause = "see why below."
    if status == -9:
        cause = "it was killed, most likely because memory ran out. Use a machine with more, or fewer --samples."
    elif re.search(r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory", "\n".join(lines)):
        cause = "memory ran out. Use a machine with more, or fewer --samples."
    elif "No space left on device" in "\n".join(lines):
        cause = "the disk is full. Make room and run again."
    return f"llmcompressor stopped at {scheme}: {cause} All of its output is in {log}; the end is:\n{end}"


def refuse_failed(folder: Path) -> None:
    """Refuse to install weights that failed verification.

    Raises:
        CogpressError: they failed; names the report.
    """
    if manifest.state(folder) == "failed":
        raise CogpressError(
            f"{folder} failed verification, so it is not installed; {folder / VERIFICATION_PAGE} tells why. Install "
            "another scheme, or change verify's limits in model.yaml and verify it again with scripts/verify."
        )


def _finish(plan: _Plan, source: Source, raw: Path) -> Quantized:
    """Make a folder of weights from the worker's tensors and the source's own settings, all or nothing."""
    result = read_json(raw / compress.RESULT)
    with new_folder(plan.target) as part:
        collect(raw, source.folder, part)
        if (source.folder / DRAFT).is_dir():
            shutil.copytree(source.folder / DRAFT, part / DRAFT)
        compression = {
            **plan.facts,
            "llmcompressor": result["llmcompressor"],
            "seconds": round(result["seconds"], 1),
            "bytes_before": manifest.weights_bytes(source.folder),
            "bytes_after": manifest.weights_bytes(part),
        }
        facts = manifest.write(part, "weights", {**_carried(source.facts), "compression": compression})
    return Quantized(plan.scheme.name, plan.target, facts, reused=False)


def collect(raw: Path, source: Path, folder: Path) -> None:
    """Move what the worker made of `source` from `raw` into `folder`, and add what an engine needs beside it.

    Raises:
        CogpressError: the worker wrote no quantized weights.
    """
    written = read_json(raw / "config.json")
    if "quantization_config" not in written or not list(raw.glob("*.safetensors")):
        raise CogpressError(f"llmcompressor wrote no quantized weights for {raw.name}. Nothing is kept.")
    for path in [*raw.glob("*.safetensors"), *raw.glob("*.safetensors.index.json")]:
        shutil.move(path, folder / path.name)
    # Tokenizer and settings are the source's own: another version of transformers writes them differently.
    copy_serving_files(source, folder)
    settings = read_json(source / "config.json")
    write_json(folder / "config.json", {**settings, "quantization_config": written["quantization_config"]})
