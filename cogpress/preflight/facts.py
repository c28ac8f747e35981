"""Gather every fact that the checks use, once, from files, programs and servers.

What is unavailable is a fact too: `problem` says why.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cogpress import config, source
from cogpress.cog.process import GPU_IMAGE, parse_cog_yaml
from cogpress.cog.program import REGISTRY, Verdict, verdict
from cogpress.errors import CogpressError, reason
from cogpress.files import read_json
from cogpress.http import Api, Reply
from cogpress.plan import architecture, estimate, hardware
from cogpress.plan.hardware import Machine as Hardware
from cogpress.preflight import machine
from cogpress.preflight.ignore import NAME, Entry, Ignore, context
from cogpress.preflight.machine import Machine
from cogpress.replicate import api, routes
from cogpress.weights import manifest
from cogpress.weights.manifest import State

HUB = "https://huggingface.co"

TRIES = 4
"""Attempts at each request to a server."""

LONGEST_WAIT = 20.0
"""Longest pause between two tries, in seconds: a check should be quick."""


@dataclass(frozen=True)
class Request:
    """What to push, and where.

    Attributes:
        root: the project's folder.
        destination: owner/name on Replicate; by default the `image` of cog.yaml.
        hardware: the SKU that the model runs on.
        file: what describes the image: `cog.yaml`, or `cog.cpu.yaml` for one that needs no GPU.
        offline: contact no server.
    """

    root: Path
    destination: str | None = None
    hardware: str | None = None
    file: str = GPU_IMAGE
    offline: bool = False


@dataclass(frozen=True)
class Weights:
    """The folder that enters the image; `different` says how it differs from its manifest."""

    folder: Path
    bytes: int = 0
    manifest: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    """The model's own config.json."""
    state: State = "unverified"
    problem: str | None = None
    different: str | None = None
    left: tuple[str, ...] = ()
    """What interrupted writers left, beside it and in the folders of runs."""


@dataclass(frozen=True)
class Asked:
    """A server's answers by route; `problem` says why there are none, `tried` whether the server was asked."""

    answers: dict[str, Reply] = field(default_factory=dict)
    problem: str | None = None
    tried: bool = False


@dataclass(frozen=True)
class Facts:
    """All facts of one preflight."""

    request: Request
    cog: dict[str, Any] | None
    cog_problem: str | None
    settings: config.Config | None
    settings_problem: str | None
    ignore: Ignore | None
    entries: list[Entry]
    weights: Weights
    hardware: Hardware | None
    """What the model will run on; None if not named or not in the table."""
    served: estimate.ServingEstimate | None
    """What scripts/plan predicts for serving there; None without a known model and hardware."""
    machine: Machine
    verdict: Verdict
    """What Cog itself says of the project."""
    replicate: Asked
    hub: dict[str, Asked]

    @property
    def root(self) -> Path:
        """The project's folder."""
        return self.request.root

    @property
    def build(self) -> dict[str, Any]:
        """The section `build` of cog.yaml; empty if there is none."""
        found = (self.cog or {}).get("build")
        return found if isinstance(found, dict) else {}

    @property
    def file(self) -> str:
        """The name of the file that describes the image."""
        return self.request.file

    @property
    def destination(self) -> str | None:
        """The destination, as owner/name."""
        return self.request.destination or _image(self.cog)

    @property
    def base(self) -> str | None:
        """The source of the weights' base; None if unknown."""
        return _base(self.weights, self.settings)

    def text(self, name: str) -> str | None:
        """The content of a file of the project; None if it is missing or not text."""
        try:
            return (self.root / name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            return None


def gather(request: Request) -> Facts:
    """Gather all facts, those that wait in parallel."""
    cog, cog_problem = _cog(request.root / request.file)
    settings, settings_problem = _settings(request.root)
    ignore = _ignore(request.root)
    with ThreadPoolExecutor(4) as pool:
        weights_found = pool.submit(_weights, request.root)
        machine_found = pool.submit(machine.look, request.root)
        verdict_found = pool.submit(_verdict, request, cog)
        replicate_found = pool.submit(_replicate, request, request.destination or _image(cog))
        weights = weights_found.result()
        named: list[str | None] = [_base(weights, settings), settings.serve.weights if settings else None]
        repositories = sorted({found for found in map(_repository, named) if found})
        hub = {name: _hub(request, name) for name in repositories}
        return Facts(
            request=request,
            cog=cog,
            cog_problem=cog_problem,
            settings=settings,
            settings_problem=settings_problem,
            ignore=ignore,
            entries=context(request.root, ignore or Ignore("")),
            weights=weights,
            hardware=(known := _hardware(request, settings)),
            served=_served(weights, settings, known),
            machine=machine_found.result(),
            verdict=verdict_found.result(),
            replicate=replicate_found.result(),
            hub=hub,
        )


def _verdict(request: Request, cog: dict[str, Any] | None) -> Verdict:
    program = machine.cog()
    if program.path is None or program.problem:
        return Verdict(problem=f"cog {program.problem}")
    named = [name for name in ("run", "train") if (cog or {}).get(name) or (name == "run" and "predict" in (cog or {}))]
    given = (request.root, program.path, program.version, named or ["run"])
    return verdict(*given, os.environ.get("REPLICATE_API_TOKEN"), file=request.file)


def _cog(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        content = parse_cog_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"cannot be read ({reason(error)})"
    except yaml.YAMLError as error:
        # Without the line itself, which may hold a secret.
        mark = getattr(error, "problem_mark", None)
        return (
            None,
            f"is not YAML{f' in line {mark.line + 1}' if mark else ''}: {getattr(error, 'problem', 'unreadable')}",
        )
    return (content, None) if isinstance(content, dict) else (None, "holds no options")


def _settings(root: Path) -> tuple[config.Config | None, str | None]:
    try:
        return config.load(root / "model.yaml"), None
    except CogpressError as error:
        return None, str(error)


def _base(weights: Weights, settings: config.Config | None) -> str | None:
    recorded = (weights.manifest or {}).get("base")
    found = recorded.get("source") if isinstance(recorded, dict) else None
    return found if isinstance(found, str) else settings.base.source if settings else None


def _hardware(request: Request, settings: config.Config | None) -> Hardware | None:
    own = settings.plan.hardware if settings else None
    try:
        return hardware.table(request.root / own if own else None).machine(request.hardware or "")
    except CogpressError:
        return None


def _served(
    weights: Weights, settings: config.Config | None, known: Hardware | None
) -> estimate.ServingEstimate | None:
    if settings is None or known is None or known.gpus == 0 or "hidden_size" not in weights.model:
        return None
    try:
        model = architecture.read(weights.model, "weights/config.json")
        return estimate.make(settings, model, replace(hardware.table(), machines=(known,))).served[0]
    except (CogpressError, IndexError):
        return None


def _ignore(root: Path) -> Ignore | None:
    try:
        return Ignore((root / NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _image(cog: dict[str, Any] | None) -> str | None:
    image = (cog or {}).get("image")
    prefix = f"{REGISTRY}/"
    return image.removeprefix(prefix) if isinstance(image, str) and image.startswith(prefix) else None


def _weights(root: Path) -> Weights:
    folder = root / "weights"
    places = [*root.glob(".*.part-*"), *root.glob("runs/.*.part-*"), *root.glob("runs/*/.*.part-*")]
    left = tuple(sorted(path.relative_to(root).as_posix() for path in places))
    size = manifest.weights_bytes(folder)
    if not size:
        return Weights(folder, problem="holds no *.safetensors", left=left)
    try:
        facts = manifest.read(folder)
        model = read_json(folder / "config.json")
    except (OSError, ValueError, CogpressError) as error:
        problem = str(error) if isinstance(error, CogpressError) else "has no config.json that can be read"
        return Weights(folder, size, problem=problem, left=left)
    if not isinstance(model, dict):
        return Weights(folder, size, facts, problem="has a config.json that is no JSON object", left=left)
    different = None
    try:
        if facts is not None:
            manifest.check(folder, facts)
        state = manifest.state(folder, facts)
    except (CogpressError, OSError, KeyError, TypeError) as error:
        state = "changed"
        different = str(error) if isinstance(error, CogpressError) else f"{folder / manifest.NAME} is damaged."
    return Weights(folder, size, facts, model, state, None, different, left)


def _replicate(request: Request, destination: str | None) -> Asked:
    if request.offline:
        return Asked(problem="servers are not asked (--offline)")
    token = os.environ.get("REPLICATE_API_TOKEN", "").strip()
    if not token:
        return Asked(problem="there is no REPLICATE_API_TOKEN to ask Replicate with")
    try:
        client = api.Replicate(*api.credentials(), tries=TRIES, longest=LONGEST_WAIT)
    except CogpressError as error:
        return Asked(problem=str(error), tried=True)
    calls = [routes.account(), routes.hardware()]
    if destination:
        calls.append(routes.model(destination))
    try:
        return Asked({call.route: client.answer(call) for call in calls})
    except CogpressError as error:
        return Asked(problem=str(error), tried=True)
    finally:
        client.close()


def _repository(text: str | None) -> str | None:
    try:
        return source.parse(text).repository or None if text and text != "embedded" else None
    except CogpressError:
        return None


def _hub(request: Request, repository: str) -> Asked:
    if request.offline or os.environ.get("HF_HUB_OFFLINE") == "1":
        return Asked(problem="servers are not asked")
    base = os.environ.get("HF_ENDPOINT") or HUB
    if not source.allowed(base):
        return Asked(problem=f"{source.shown(base)} (HF_ENDPOINT) is neither https nor this machine")
    from huggingface_hub import get_token  # slow to import, and most projects do not need it

    route = f"/api/models/{repository}"
    hub = Api(base, get_token(), f"The Hugging Face Hub at {source.shown(base)}", tries=TRIES, longest=LONGEST_WAIT)
    try:
        return Asked({route: hub.send("GET", route)})
    except CogpressError as error:
        return Asked(problem=str(error), tried=True)
    finally:
        hub.close()
