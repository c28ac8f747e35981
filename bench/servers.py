"""The two local servers, cogpress's and vLLM's own, started one after the other with equal options."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from bench.measure import in_fresh_process
from cogpress import http
from cogpress.cog import schema
from cogpress.cog.process import Server, end_family, free_port, read_cog_yaml
from cogpress.config import Serve
from cogpress.errors import CogpressError

OURS, THEIRS = "cogpress", "vllm"

READY_SECONDS = 1800.0


# ---------------------------------------------------------------------------------------------------------------------
# Equal options
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What both servers run with: vLLM's options and environment, the names of the GPUs, and their memory share."""

    options: dict[str, Any]
    environment: dict[str, str]
    gpus: list[str]
    gpu_memory_share: float


def machine(root: Path, weights: Path, serve: Serve) -> Machine:
    """Inspect this machine in another process, since torch would hold memory, and a CUDA context, until the end.

    Args:
        root: the project's folder; its runner sets the concurrency.
        weights: the folder that both serve.
        serve: the options.

    Raises:
        CogpressError: an option does not fit this machine or these weights.
    """
    concurrency = schema.concurrency(root, str(read_cog_yaml(root).get("run", "")))
    found: Machine = in_fresh_process(_machine, root, weights, serve, concurrency)
    return found


def _machine(root: Path, weights: Path, serve: Serve, concurrency: int) -> Machine:
    import torch

    from cogpress.engines import vllm
    from cogpress.serve import model as serving

    serve = serving.with_draft(serve, root)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        # Both servers share the GPUs.
        serve = serve.model_copy(update={"gpu_memory_share": serve.memory_share / 2})
    capability = torch.cuda.get_device_capability() if gpus else None
    options = vllm.options(weights, serve, concurrency, 0, gpus, capability)
    environment = {**vllm.environment(serve, bool(gpus)), **vllm.compile_cache(weights, options)}
    names = [str(torch.cuda.get_device_name(at)) for at in range(gpus)]
    return Machine(options, environment, names, serve.memory_share)


_PLAIN_FLAGS = ("disable_log_stats",)
"""Flags of vLLM's server without a `--no-` form."""


def flags(options: Mapping[str, Any]) -> list[str]:
    """vLLM's engine options as command-line flags; None keeps the default."""
    found: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            if value or name not in _PLAIN_FLAGS:
                found.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            found += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def _project(root: Path, folder: Path, share: float) -> Path:
    """The project as links, with another `serve.gpu_memory_share`, as a runner reads its options from its folder."""
    root = root.resolve()
    run = str(read_cog_yaml(root).get("run", "")).partition(":")[0]
    own = {"cog.yaml", "model.yaml", run}
    for entry in root.iterdir():
        if entry.name not in own | {".cog", ".git"}:
            (folder / entry.name).symlink_to(entry)
    for name in own - {"model.yaml"}:
        shutil.copy(root / name, folder / name)  # the runner finds its folder by resolving links
    model = yaml.safe_load((root / "model.yaml").read_text(encoding="utf-8")) or {}
    model["serve"] = {**(model.get("serve") or {}), "gpu_memory_share": share}
    (folder / "model.yaml").write_text(yaml.safe_dump(model, allow_unicode=True), encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Starting and ending
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """A running server: its log, the seconds until it was ready, its leading process, and the GPU memory it took."""

    url: str
    log: Path
    seconds: float
    leader: int | None
    gpu_gb: float | None

    def memory_gb(self) -> float:
        """Its processes' proportional set size, which counts shared memory once."""
        try:
            leader = psutil.Process(self.leader) if self.leader else None
            family = [leader, *leader.children(recursive=True)] if leader else []
        except psutil.NoSuchProcess:
            return 0.0
        return sum(map(_pss, family)) / 1e9

    def parts(self) -> dict[str, float]:
        """The seconds of each part of its start, if its log has them."""
        return cold_start(self.log.read_text(errors="replace")) if self.log.is_file() else {}


def start(
    root: Path,
    weights: Path,
    found: Machine,
    logs: Path,
    stack: ExitStack,
    tell: Callable[[str], None],
    *,
    warm_disk: bool,
) -> dict[str, Local]:
    """Start one server after the other, so that neither start slows the other.

    Args:
        root: the project's folder.
        weights: the folder that both serve.
        found: what they run with.
        logs: the folder for their output.
        stack: ends them.
        tell: reports progress.
        warm_disk: start a server once before, unmeasured.

    Raises:
        CogpressError: a server does not start.
    """
    ours, theirs = (logs / f"serve-{name}.log" for name in (OURS, THEIRS))
    if warm_disk:
        tell("a start that is not measured")
        with _vllm(found, theirs):
            pass
    if found.gpus:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = _project(root, folder, found.gpu_memory_share)
    cuda = bool(found.gpus)
    tell("starting cogpress's server")
    first = _started(stack, _cogpress(root, weights, ours), ours, cuda)
    tell("starting vLLM's server")
    return {OURS: first, THEIRS: _started(stack, _vllm(found, theirs), theirs, cuda)}


def _started(stack: ExitStack, server: AbstractContextManager[str], log: Path, cuda: bool) -> Local:
    before, gpu = _children(), _gpu_gb() if cuda else None
    began = time.perf_counter()
    url = stack.enter_context(server)
    seconds = time.perf_counter() - began
    after = _gpu_gb() if cuda else None
    took = after - gpu if after is not None and gpu is not None else None
    return Local(url, log, seconds, next(iter(_children() - before), None), took)


@contextmanager
def _cogpress(root: Path, weights: Path, log: Path) -> Iterator[str]:
    with Server(root, weights=str(weights), log=log) as server:
        server.wait_ready(READY_SECONDS)
        yield server.url


@contextmanager
def _vllm(found: Machine, log: Path) -> Iterator[str]:
    """vLLM's own OpenAI server with our engine options."""
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    # No log line per request, and no sampling options from the weights, which ours ignores too.
    command += ["--disable-uvicorn-access-log", "--generation-config", "vllm", *flags(found.options)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **found.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_healthy(process, url, log)
        yield url
    finally:
        end_family(process)


def _wait_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with http.connect(url, timeout=2.0) as opened:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
                end = f", and said last: {lines[-1][:300]}" if lines else ""
                raise CogpressError(
                    f"vLLM's server ended with exit status {process.returncode} before it was ready{end}. All of its "
                    f"output is in {log}."
                )
            try:
                if opened.get(f"{url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
    raise CogpressError(f"vLLM's server was not ready after {READY_SECONDS:.0f} s. Its output is in {log}.")


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _pss(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(memory, "pss", memory.rss))


def _gpu_gb() -> float | None:
    """Memory in use on all GPUs, since a container cannot tell processes apart; None if it is unknown."""
    try:
        import pynvml

        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(at) for at in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices)) / 1e9
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


def cold_start(log: str) -> dict[str, float]:
    """The seconds of each part of a start, from the line that `serving.cold_start_line` writes; empty without one."""
    found = re.search(r"Ready to answer after ([\d.]+) s: ([^;]*)(?:;.*?saved ([\d.]+) s)?", log)
    if found is None:
        return {}
    parts = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", found[2])}
    return {**parts, **({"saved": float(found[3])} if found[3] else {}), "total": float(found[1])}
