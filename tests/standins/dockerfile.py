"""What `cog build` writes for a project: the Dockerfile and the requirements, as the real program was seen to.

Held equal to a Dockerfile that it wrote, and an image for CPUs to the environment of a real one
(tests/cog/test_dockerfile.py). `for_engine` changes the text only where an old engine or a machine without GitHub needs
it.
"""

from __future__ import annotations

import re
from pathlib import Path

from cogpress.cog import schema
from cogpress.cog.process import GPU_IMAGE, read_cog_yaml

GPU_BASE = {"13.0": "nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04"}
"""The base by `build.cuda`, where Cog's own base images are not used."""

UV = "ghcr.io/astral-sh/uv:0.9.26"

PREAMBLE = """\
ENV DEBIAN_FRONTEND=noninteractive
ENV PYTHONUNBUFFERED=1
ENV LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/usr/lib/x86_64-linux-gnu:/usr/local/nvidia/lib64:/usr/local/nvidia/bin
ENV NVIDIA_DRIVER_CAPABILITIES=all"""

CACHE = "/root" + "/.cache"
"""Of the image's user."""

APT = "RUN --mount=type=cache,target=/var/cache/apt,sharing=locked"

TINI = rf"""{APT} set -eux; \
apt-get update -qq && \
apt-get install -qqy --no-install-recommends curl; \
rm -rf /var/lib/apt/lists/*; \
TINI_VERSION=v0.19.0; \
TINI_ARCH="$(dpkg --print-architecture)"; \
curl -sSL -o /sbin/tini "https://github.com/krallin/tini/releases/download/${{TINI_VERSION}}/tini-${{TINI_ARCH}}"; \
chmod +x /sbin/tini"""

CFLAGS = 'ENV CFLAGS="-O3 -funroll-loops -fno-strict-aliasing -flto -S"'

LIBRARIES = (
    r"""RUN find / -type f -name "*python*.so" -printf "%h\n" | sort -u > /etc/ld.so.conf.d/cog.conf && ldconfig"""
)


def dockerfile(root: Path, file: str = GPU_IMAGE) -> str:
    """The Dockerfile of a project, without Cog's own base image and without separate weights."""
    settings = read_cog_yaml(root, file)
    build, python = settings["build"], settings["build"]["python_version"]
    gpu = build.get("gpu") is True
    lines = ["#syntax=docker/dockerfile:1.4", f"FROM {GPU_BASE[build['cuda']] if gpu else f'python:{python}-slim'}"]
    lines += [PREAMBLE, TINI, 'ENTRYPOINT ["/sbin/tini", "--"]']
    lines += ["ENV " + " ".join(sorted(settings["environment"]))]
    if system := build.get("system_packages"):
        lines += [f"{APT} apt-get update -qq && apt-get install -qqy {' '.join(system)} && rm -rf /var/lib/apt/lists/*"]
    uv = [f"COPY --from={UV} /uv /uvx /usr/local/bin/", "ENV UV_SYSTEM_PYTHON=true"]
    if gpu:
        tools = "".join(f"\t{name} \\\n" for name in ("wget", "curl", "xz-utils", "git", "ca-certificates"))
        lines += [f"{APT} apt-get update -qq && apt-get install -qqy --no-install-recommends \\\n{tools}"]
        lines[-1] += "\t&& rm -rf /var/lib/apt/lists/*"
        links = [
            f"\tln -sf $(uv python find {python}) {place}" for place in ("/usr/bin/python3", "/usr/local/bin/python")
        ]
        lines += [*uv, " && \\\n".join([f"RUN uv python install {python}", *links])]
        lines += [f"ENV UV_PYTHON={python}", 'ENV PATH="/usr/local/bin:$PATH"']
    else:
        lines += uv
    lines += ["COPY --from=cog_build requirements.txt /tmp/requirements.txt", CFLAGS]
    pip = f"uv run pip install --break-system-packages --cache-dir {CACHE}/pip -r /tmp/requirements.txt"
    lines += [f"RUN --mount=type=cache,target={CACHE}/pip {pip}", "ENV CFLAGS=", CFLAGS]
    sdk = f"uv pip install --break-system-packages --no-cache cog=={build['sdk_version']}"
    lines += [f"RUN --mount=type=cache,target={CACHE}/uv {sdk}", "ENV CFLAGS=", LIBRARIES]
    lines += [f"RUN {command}" for command in build.get("run", [])]
    lines += ["WORKDIR /src", "EXPOSE 5000", f'ENV COG_PREDICT_TYPE_STUB="{settings["run"]}"']
    lines += [f'ENV COG_TRAIN_TYPE_STUB="{settings["train"]}"'] if settings.get("train") else []
    lines += [f"ENV COG_MAX_CONCURRENCY={schema.concurrency(root, settings['run'])}"]
    lines += ['CMD ["python", "-m", "cog.server.http"]', "COPY . /src"]
    # Cog's image of another file than cog.yaml has it under that name.
    return "\n".join(lines + ([] if file == GPU_IMAGE else [f"RUN cp /src/{file} /src/cog.yaml"]))


def requirements(root: Path, file: str = GPU_IMAGE) -> str:
    """What Cog makes of a lock: names and versions."""
    text = (root / read_cog_yaml(root, file)["build"]["python_requirements"]).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^[a-zA-Z0-9_-]+==[^ ;]+", text, re.MULTILINE))


def for_engine(text: str, requirements: str, *, old: bool, github: bool) -> str:
    """A Dockerfile for the engine at hand.

    Args:
        text: as Cog writes it.
        requirements: the path of Cog's requirements in the build's folder.
        old: whether the engine's own frontend knows neither named contexts nor links, and no newer one can be pulled.
        github: whether GitHub can be reached; otherwise tini is Debian's, and there is no pget.
    """
    changes = [("COPY --from=cog_build requirements.txt", f"COPY {requirements}")]
    if old:
        changes += [("#syntax=docker/dockerfile:1.4\n", ""), ("--link ", "")]
    if not github:
        debian = f"{APT} apt-get update -qq && apt-get install -qqy --no-install-recommends curl tini && \\\n"
        changes += [(TINI, debian + "ln -s /usr/bin/tini /sbin/tini && rm -rf /var/lib/apt/lists/*")]
        changes += [(line + "\n", "") for line in text.splitlines() if "github.com/replicate/pget" in line]
    for before, after in changes:
        text = text.replace(before, after)
    return text
