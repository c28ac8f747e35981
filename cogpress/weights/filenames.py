"""The names of a model's files: what an engine reads, what a repository has to hold, and what is refused."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path, PurePosixPath

from cogpress.errors import CogpressError

SINGLE = "model.safetensors"
"""The file of a model that has no shards."""

INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor, in Hugging Face's layout."""

ADAPTER_CONFIG = "adapter_config.json"
"""An adapter's settings, in peft's layout; a folder that holds it is an adapter."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""An adapter's matrices, in peft's layout."""

VERIFICATION = "verification.json"
VERIFICATION_PAGE = "verification.md"
VERIFICATION_PLOT = "verification.png"
VERIFICATION_FILES = (VERIFICATION, VERIFICATION_PAGE, VERIFICATION_PLOT)
"""The report on a folder of weights: for programs, for people, and its plot."""

ADAPTER = "adapter"
"""The folder of a run, and of the tar of its weights, that holds the adapter; it has a manifest of its own."""

DRAFT = "draft"
"""The folder in the weights that holds what drafts their answers."""

COMPILED = "compiled"
"""The folder beside the weights for what was compiled for a GPU."""

SERVING_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What an engine reads beside the weights, whatever the tokenizer's kind."""

TEMPLATES = "additional_chat_templates"
"""The folder of a model's named chat templates, such as `tool_use.jinja`, beside its usual one."""

HUB_FILES = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer.model*"),
    *("vocab.txt", "vocab.bpe", "merges.txt", "LICENSE*"),
)
"""What training and serving need of a repository on the Hub beside the weights."""

_TAKEN = (*HUB_FILES, "*.safetensors", *VERIFICATION_FILES, "NOTICE*", "*.md", ".gitattributes")
"""What is taken of foreign weights: data that the kit reads, and pages for people."""

_LOADED = (
    *("*.safetensors", "*.index.json", "*config.json", "*.jinja", "*.model"),
    *("tokenizer*", "*token*.json", "vocab.*", "merges.txt"),
)

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
"""Suffixes of files that can run code when they are loaded."""

CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh"}
"""Suffixes of programs, which no model in safetensors needs."""

MAX_NAME = 255
"""Bytes of a file's whole path."""


def serving_files(folder: Path) -> list[str]:
    """What a folder holds of the files that an engine reads beside the weights."""
    named = sorted(path.name for path in (folder / TEMPLATES).glob("*.jinja"))
    return [name for name in SERVING_FILES if (folder / name).is_file()] + [f"{TEMPLATES}/{name}" for name in named]


def tokenizer_files(folder: Path) -> list[str]:
    """What a folder holds of a tokenizer and its templates: its `serving_files` without the model's own."""
    return [name for name in serving_files(folder) if name not in ("config.json", "generation_config.json")]


def tokenizer_folder(base: Path, adapter: Path) -> Path:
    """Where the tokenizer of a training is: with the adapter, where that has its own, else with the base."""
    return adapter if tokenizer_files(adapter) else base


def copy_serving_files(source: Path, target: Path) -> None:
    """Copy a folder's `serving_files` into another."""
    for name in serving_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def is_loaded(name: str) -> bool:
    """Whether loading a model from a repository may read this file of it."""
    return PurePosixPath(name).suffix in PICKLES or any(fnmatch(name, pattern) for pattern in _LOADED)


def is_taken(name: str) -> bool:
    """Whether a file of foreign weights, by its path in their folder, is one that a model or its adapter may have.

    The list says what is taken and not what is refused: some library may run a file of any other name.
    """
    path = PurePosixPath(name)
    inner = path.relative_to(ADAPTER) if path.parts[:1] == (ADAPTER,) and len(path.parts) > 1 else path
    usual = str(inner.parent) in (".", DRAFT, TEMPLATES)
    runs = path.suffix.lower() in PICKLES | CODE
    return usual and not runs and any(fnmatchcase(path.name, pattern) for pattern in _TAKEN)


def safe_name(text: str, shown: str) -> PurePosixPath:
    """A file's path inside a folder, as an untrusted tar or list names it.

    Raises:
        CogpressError: the path leads outside, is no plain name, or is a file's that can run code: a pickle, a program,
            or what another machine's engine compiled (vLLM unpickles that).
    """
    name = PurePosixPath(text)
    if name.is_absolute() or ".." in name.parts or "\\" in text or not name.parts:
        raise CogpressError(f"{shown} holds {text[:80]!r}, a path outside its folder, and is refused.")
    if not text.isprintable() or len(text.encode()) > MAX_NAME:
        raise CogpressError(f"{shown} holds {text[:80]!r}, which is no file name, and is refused.")
    refuse_pickle(name, shown)
    if COMPILED in name.parts[:-1] or name.suffix.lower() in CODE:
        raise CogpressError(
            f"{shown} holds {name}, which can run code, and is refused. Pack the weights without it; compiled code is "
            "made anew where they are served."
        )
    return name


def refuse_pickle(name: PurePosixPath, place: Path | str) -> None:
    """Refuse a file that can run code when it is loaded.

    Raises:
        CogpressError: with the way to convert it.
    """
    if name.suffix.lower() in PICKLES:
        raise CogpressError(
            f"{place} holds {name}, a pickle file, which can run code when it is loaded. Load the model where you "
            "trust it and save it with save_pretrained(folder), which writes safetensors."
        )
