"""The stand-in for `cog`: it records each call and refuses what the real program would, or what leaks a token.

A test copies it onto the PATH as `cog`, with `cog-standin.json` beside it: the API's token, which it must never
see, its own, which only standard input may hold, and the address of the stand-in for Replicate
(tests/standins/pushreplicate.py), where a push creates a version, and the folder of this repository, where it finds
what it refuses of a project.
"""

import hashlib
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
STATE = json.loads((HERE / "cog-standin.json").read_text())
DOCKER = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
VALUES = {"--progress": {"auto", "plain", "tty", "quiet"}, "--openapi-schema": None, "--secret": None}
FLAGS = {"--separate-weights", "--no-cache"}
LAYER_BYTES = 10_000_000
MANIFEST = Path(".cog/cache/weights_manifest.json")
BUILT = HERE / "cog-weights-images.json"


def main(arguments):
    check_secrecy(arguments)
    note(arguments)
    if arguments == ["--version"]:
        print("cog version 0.23.1 (built 2026-01-01T00:00:00Z)")
    elif arguments == ["doctor"]:
        print("no issues found")
    elif arguments[:1] in (["run"], ["train"]):
        read_project(arguments[0], arguments[2] if arguments[1:2] == ["-f"] else "cog.yaml")
        fail('unknown input "nope"')
    elif arguments[:1] == ["login"]:
        login(arguments[1:])
    elif arguments[:1] == ["push"]:
        push(arguments[1:])
    else:
        fail(f"unknown command {arguments[:1]}", 2)


def check_secrecy(arguments):
    tokens = (STATE["api_token"], STATE["cli_token"])
    if any(token in argument for token in tokens for argument in arguments):
        violation("a token is on the command line")
    for name, value in os.environ.items():
        if any(token in value for token in tokens):
            violation(f"a token is in the environment, as {name}")
        if "TOKEN" in name and value:
            violation(f"{name} is in the environment")
    for name in ("COG_NO_UPDATE_CHECK", "NO_COLOR"):
        if os.environ.get(name) != "1":
            violation(f"{name}=1 is not set")


def login(arguments):
    if arguments != ["--token-stdin"]:
        violation(f"login is given {arguments}")
    given = sys.stdin.read().strip()
    if not given:
        fail("token is empty")
    if given.startswith("r8_"):
        fail(
            "that looks like a Replicate API token, not a CLI auth token. Please fetch a token from "
            "https://replicate.com/auth/token to log in"
        )
    if given != STATE["cli_token"]:
        fail("invalid token")
    DOCKER.parent.mkdir(parents=True, exist_ok=True)
    DOCKER.write_text(json.dumps({"auths": {"r8.im": {}}}))
    print("You've successfully authenticated as local! You can now use the 'r8.im' registry.")


def read_project(mode, file="cog.yaml"):
    """Refuse the project in the folder, where it is one of those that the real program is known to refuse."""
    sys.path.insert(0, STATE["repository"])
    from tests.standins.cogreading import build_refusal, refusal

    if said := build_refusal(Path.cwd()) if mode == "build" else refusal(Path.cwd(), mode, file):
        fail(said)


def push(arguments):
    if not sys.stdin.isatty() and sys.stdin.read():
        violation("push is given something on its standard input")
    image, given = read_options(arguments)
    match = re.fullmatch(r"r8\.im/([a-z0-9][\w.-]*/[a-z0-9][\w.-]*)", image or "")
    if match is None:
        violation(f"push is given the image {image!r}")
    if not Path("cog.yaml").is_file():
        fail("cog.yaml not found in the folder or its parents")
    for mode in ("run", "train", "build"):
        read_project(mode)
    say(f"Building Docker image from environment in cog.yaml as {image}...")
    if STATE.get("fail"):
        fail(STATE["fail"])
    weights = weight_files() if "--separate-weights" in given else {}
    built = read(BUILT) or []
    if weights and read(MANIFEST) == weights and image not in built:
        fail(f"{image}-weights:latest: not found")
    # It looks at the log-in only when it has built.
    if "r8.im" not in ((read(DOCKER) or {}).get("auths") or {}):
        fail("You are not logged in to r8.im. Run 'cog login' first.")
    body = {"model": match.group(1), "root": os.getcwd(), "separate_weights": "--separate-weights" in given}
    body["layers"] = sorted({folder for folder, _ in weights.values()})
    request = urllib.request.Request(STATE["url"] + "/standin/push", json.dumps(body).encode(), method="POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=300) as answer:
            made = json.load(answer)
    except urllib.error.HTTPError as error:
        fail(json.load(error))
    # What `docker image inspect` says of the image that this made.
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path().rglob("*")) if path.is_file()]
    layers = ["sha256:" + "0" * 64, "sha256:" + hashlib.sha256("".join(content).encode()).hexdigest()]
    anew = ["sha256:" + hashlib.sha256(image.encode()).hexdigest()] if STATE.get("no_cache") else []
    (HERE / image.replace("/", "_")).write_text(json.dumps(layers[: len(layers) - len(anew)] + anew))
    if weights:
        MANIFEST.parent.mkdir(parents=True, exist_ok=True)
        MANIFEST.write_text(json.dumps(weights))
        BUILT.write_text(json.dumps([*built, image]))
    say(f"Pushing image '{image}'...")
    if not STATE.get("silent"):
        say(f"  image  {image}@sha256:{made['id']}")
    say(f"  https://replicate.com/{match.group(1)}")


def weight_files():
    """The files of the weights' layer, each with its layer's folder and hash, as Cog finds them.

    It takes the topmost folders with a big file and no code anywhere below, and does not ask .dockerignore.
    """
    found = {}
    for name, folders, files in os.walk("."):
        place = Path(name)
        sizes = [(place / file).lstat().st_size for file in files]
        code = [path for path in place.rglob("*") if path.suffix in (".py", ".ipynb")]
        if place != Path() and max(sizes, default=0) >= LAYER_BYTES and not code:
            folders.clear()
            for path in filter(Path.is_file, place.rglob("*")):
                found[path.as_posix()] = [place.as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
    return found


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


def read_options(arguments):
    image, given, rest = None, {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in FLAGS and not equals:
            given[name] = True
        elif name in VALUES:
            given[name] = value if equals else (rest.pop(0) if rest else fail(f"{name} needs a value", 2))
            if VALUES[name] is not None and given[name] not in VALUES[name]:
                fail(f"invalid argument {given[name]!r} for {name}", 2)
        elif name.startswith("-") or image is not None:
            fail(f"unknown argument {name!r}", 2)
        else:
            image = name
    return image, given


def note(arguments):
    with (HERE / "cog-calls.jsonl").open("a") as file:
        file.write(json.dumps({"arguments": arguments, "folder": os.getcwd()}) + "\n")


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(text, status=1):
    say(f"cog: {text}")
    sys.exit(status)


def violation(text):
    with (HERE / "cog-violations.txt").open("a") as file:
        file.write(text + "\n")
    fail(f"VIOLATION: {text}", 97)


if __name__ == "__main__":
    main(sys.argv[1:])
