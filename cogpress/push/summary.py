"""Print the end of a push: the model's page, its version, each step's time, and programs that call it."""

from __future__ import annotations

import json
import pprint
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogpress.replicate.api import ADDRESS

_WIDTH = 76


@dataclass(frozen=True)
class Shipped:
    """A finished push.

    Attributes:
        model: as Replicate describes it.
        version: the id of the version that is live now.
        document: its OpenAPI document.
        steps: by name, with seconds, result and whether an earlier push did them.
        notes: for the user.
    """

    model: dict[str, Any]
    version: str
    document: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def calls(model: str, version: str, example: Mapping[str, Any], base: str = ADDRESS) -> dict[str, str]:
    """Whole programs that run a prediction, by title. They read the token from the environment.

    Args:
        model: owner/name.
        version: its id.
        example: the input.
        base: the API's address.
    """
    reference = f"{model}:{version}"
    given = dict(example)
    python = textwrap.indent(pprint.pformat(given, width=_WIDTH, sort_dicts=False), "    ").strip()
    javascript = textwrap.indent(json.dumps(given, indent=2, ensure_ascii=False), "  ").strip()
    body = {"version": version, "input": given}
    return {
        "Python": (
            "import replicate\n\n"
            f'for text in replicate.stream(\n    "{reference}",\n    input={python},\n):\n    print(text, end="")'
        ),
        "JavaScript": (
            'import Replicate from "replicate";\n\nconst replicate = new Replicate();\n'
            f'const events = replicate.stream("{reference}", {{\n  input: {javascript},\n}});\n'
            "for await (const { event, data } of events) {\n"
            '  if (event === "output") process.stdout.write(data);\n}'
        ),
        "curl": _curl(base, body, "-H 'Prefer: wait'"),
        "HTTP stream": (
            f"url=$({_curl(base, {**body, 'stream': True})} |\n"
            '  python3 -c \'import json, sys; print(json.load(sys.stdin)["urls"]["stream"])\')\n'
            "curl -sSN -H 'Accept: text/event-stream' \"$url\""
        ),
    }


def _curl(base: str, body: Mapping[str, Any], more: str = "") -> str:
    """For bash and zsh. The token goes through a file descriptor, as other users can read a command line."""
    lines = [
        f"curl -sS {shlex.quote(base.rstrip('/') + '/v1/predictions')}",
        "-H @<(printf 'Authorization: Bearer %s' \"$REPLICATE_API_TOKEN\")",
        f"-H 'Content-Type: application/json' {more}".strip(),
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
    ]
    return " \\\n  ".join(lines)


def show(shipped: Shipped, model: str, example: Mapping[str, Any] | None, base: str, console: Console) -> None:
    """Print it.

    Args:
        shipped: the finished push.
        model: owner/name.
        example: the programs' input; None prints no programs.
        base: the API's address.
        console: to print to.
    """
    address = str(shipped.model.get("url") or f"https://replicate.com/{model}")
    console.print(Text.assemble("\n", (f"{model} is pushed.", "bold green")))
    console.print(Text.assemble(("  playground  ", "dim"), address), soft_wrap=True)
    console.print(Text.assemble(("  version     ", "dim"), shipped.version), soft_wrap=True)
    for note in shipped.notes:
        console.print(Text.assemble(("! ", "yellow"), note))
    console.print()
    console.print(times(shipped.steps))
    if example is None:
        return
    for title, program in calls(model, shipped.version, example, base).items():
        console.print(Text(f"\n{title}", "bold"))
        # No wrapping, so that programs can be copied.
        console.print(Text(program), soft_wrap=True)


def times(steps: Mapping[str, Mapping[str, Any]]) -> Table:
    """Each step's time."""
    table = Table("step", "seconds", "", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[1].justify = "right"
    for name, found in steps.items():
        table.add_row(name, f"{found['seconds']:.1f}", Text("done before" if found["before"] else "", "dim"))
    total = sum(found["seconds"] for found in steps.values() if not found["before"])
    table.add_row(Text("this push", "bold"), f"{total:.1f}")
    return table
