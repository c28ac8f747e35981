"""`model.yaml`, read and validated once into the typed objects of `cogpress.options`.

`auto` stays `auto` here; it is resolved where the machine is known.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field

from cogpress import source
from cogpress.errors import CogpressError
from cogpress.options import (
    Base,
    Case,
    Data,
    Deployment,
    EngineName,
    Fuzz,
    Merge,
    Plan,
    Playground,
    Prompt,
    Push,
    Quantization,
    Section,
    Serve,
    Source,
    Task,
    TestTraining,
    Train,
    Verify,
)

__all__ = [
    "Base", "Case", "Config", "Data", "Deployment", "EngineName", "Fuzz", "Merge", "Plan", "Playground", "Prompt",
    "Push", "Quantization", "Serve", "Task", "TestTraining", "Train", "Verify", "load", "parse",
]  # fmt: skip


_AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Config(Section):
    """One model, from base to server."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$")] = "model"
    """Name of the run's folder in `runs/`."""
    base: Base = Base()
    prompt: Prompt = Prompt()
    data: Data = Data()
    train: Train = Train()
    merge: Merge = "dequantized"
    """What the adapter is [merged into](merge.md): the `dequantized` base, as training saw it; the `original` weights;
    or `balanced`, the original weights with as much of the quantization's error as the task needs."""
    verify: Verify = Verify()
    serve: Serve = Serve()
    playground: Playground = Playground()
    plan: Plan = Plan()
    push: Push = Push()
    adapters: dict[_AdapterName, Source] = Field(default_factory=dict)
    """[Several adapters over one base](serving.md#several-adapters-over-one-base), by name: each a source."""

    def public(self) -> dict[str, Any]:
        """As JSON for files that are passed on: sources without the secrets that a URL can hold."""
        data = self.model_dump(mode="json")
        for section, option in (("base", "source"), ("serve", "weights")):
            data[section][option] = data[section][option] and source.shown(data[section][option])
        data["adapters"] = {name: source.shown(place) for name, place in data["adapters"].items()}
        speculative = data["serve"]["speculative"]
        if isinstance(speculative, dict) and "model" in speculative:
            speculative["model"] = source.shown(speculative["model"])
        return data

    def override(self, inputs: dict[str, Any]) -> Config:
        """A validated copy with a training's inputs in their places; None and `model.yaml` change nothing.

        Raises:
            CogpressError: a value is out of bounds.
        """
        data = self.model_dump()
        for name, value in inputs.items():
            if value is not None and value != "model.yaml":
                section, option = _PLACES.get(name, ("train", name))
                data[section][option] = value
        return parse(data, "What was given")


_PLACES = {
    "base_model": ("base", "source"),
    "quantization": ("base", "quantization"),
    "train_data": ("data", "train"),
    "validation_share": ("data", "validation_share"),
}
"""Inputs of a training that belong to other sections than `train`."""


def parse(data: Any, place: str) -> Config:
    """Validate the content of a YAML file.

    Raises:
        CogpressError: names the option, the place and what was expected.
    """
    try:
        # A section with every line commented out is None and means its defaults.
        if isinstance(data, dict):
            data = {name: value for name, value in data.items() if value is not None}
        return Config.model_validate({} if data is None else data)
    except pydantic.ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "the file"
            if problem["type"] == "extra_forbidden":
                lines.append(f"{where[:200]} is not an option")
            else:
                given = problem["input"]
                # A URL can hold a signature.
                given = source.shown(given) if isinstance(given, str) else given
                lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {_SHORT.repr(given)})")
        raise CogpressError(
            f"{place} is not valid: {'; '.join(lines[:_PROBLEMS])}. docs/configuration.md lists every option."
        ) from None


_PROBLEMS = 8
"""Most that one message names."""

_SHORT = reprlib.Repr()  # aliases in YAML can make a value of a few lines endless
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


def parse_yaml(read: Callable[[], Any]) -> Any:
    """What a YAML loader reads.

    Raises:
        yaml.YAMLError: it is not YAML, whatever the loader raises.
    """
    try:
        return read()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    # Of values that are not what their tag says, such as the 31st of February.
    except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise yaml.YAMLError(f"a value is not of its type ({str(error)[:200]})") from None


def load(path: Path) -> Config:
    """Read and validate `model.yaml`.

    Raises:
        CogpressError: the file is missing, is not YAML, or holds an option that does not exist or is out of bounds.
    """
    try:
        data = parse_yaml(yaml.SafeLoader(path.read_text(encoding="utf-8")).get_single_data)
    except FileNotFoundError:
        raise CogpressError(f"{path} does not exist. Copy model.yaml from the repository, or name one.") from None
    except OSError as error:
        raise CogpressError(f"{path} cannot be read: {error.strerror}. Name a file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogpressError(f"{path} is not YAML: {' '.join(str(error).split())}. Correct that line.") from None
    return parse(data, str(path))
