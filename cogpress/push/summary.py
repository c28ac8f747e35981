"""The end of a push: the model's page, its version, what the tests took and cost, and programs that call it."""

from __future__ import annotations

import json
import pprint
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogpress.replicate.api import ADDRESS

PROGRAMS = "programs.md"
"""Beside the report: every program that calls the model."""

SPENT = "predict_seconds"
"""In a step's result: the run time of its predictions and trainings, in seconds."""

_WIDTH = 76


@dataclass(frozen=True)
class Cost:
    """What the predictions and trainings of a push took.

    Attributes:
        seconds: their run time, without starts and idle instances.
        hardware: the SKU whose price is taken; None where no price is known.
        price_per_second: its price in US dollars; None likewise.
    """

    seconds: float
    hardware: str | None = None
    price_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the `dollars`, None where the price is unknown."""
        price = self.price_per_second
        return {**asdict(self), "dollars": None if price is None else price * self.seconds}

    def __str__(self) -> str:
        told = f"{self.seconds:.1f} s"
        if self.price_per_second is None:
            return told
        return f"{told}, ${self.price_per_second * self.seconds:.4f} at {self.hardware}'s price, without starts"


@dataclass(frozen=True)
class Shipped:
    """A finished push.

    Attributes:
        model: as Replicate describes it.
        version: the id of the version that is live now.
        document: its OpenAPI document.
        steps: by name, with seconds, result and whether an earlier push did them.
        notes: for the user.
        cold_boot: seconds that the first test prediction waited for an instance; None where there was none.
        cost: of the tests that this push ran.
        deployment: owner/name of the deployment that runs the version.
    """

    model: dict[str, Any]
    version: str
    document: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    cold_boot: float | None
    cost: Cost
    deployment: str | None = None


def cold_boot(tests: Mapping[str, Any]) -> float | None:
    """Seconds that the first of the test predictions waited; None without one that says so."""
    outcomes = tests.get("outcomes") or [{}]
    return outcomes[0].get("waited") or None


def programs(model: str, shipped: Shipped, example: Mapping[str, Any], base: str = ADDRESS) -> dict[str, str]:
    """Whole programs that run a prediction, by title. They read the token from the environment.

    Args:
        model: owner/name.
        shipped: the finished push.
        example: the input.
        base: the API's address.
    """
    reference = f"{model}:{shipped.version}"
    given = dict(example)
    python = textwrap.indent(pprint.pformat(given, width=_WIDTH, sort_dicts=False), "    ").strip()
    javascript = textwrap.indent(json.dumps(given, indent=2, ensure_ascii=False), "  ").strip()
    body = {"version": shipped.version, "input": given}
    made = {
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
        "curl": _curl(base, "/v1/predictions", body, "-H 'Prefer: wait'"),
        "HTTP stream": (
            f"url=$({_curl(base, '/v1/predictions', {**body, 'stream': True})} |\n"
            '  python3 -c \'import json, sys; print(json.load(sys.stdin)["urls"]["stream"])\')\n'
            "curl -sSN -H 'Accept: text/event-stream' \"$url\""
        ),
    }
    if shipped.deployment:
        route = f"/v1/deployments/{shipped.deployment}/predictions"
        made["Deployment"] = _curl(base, route, {"input": given}, "-H 'Prefer: wait'")
    return {**made, "Webhook receiver": _RECEIVER}


_RECEIVER = """\
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import replicate

# Give its public https address as "webhook" beside "input" when you create a prediction.
secret = replicate.webhooks.default.secret()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["content-length"]))
        try:
            body = content.decode()
            replicate.webhooks.validate(
                headers=dict(self.headers), body=body, secret=secret, tolerance=300
            )
        except ValueError:
            self.send_error(401)
            return
        self.send_response(200)
        self.end_headers()
        prediction = json.loads(body)
        print(prediction["id"], prediction["status"], prediction.get("output"), flush=True)


HTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()"""
"""Replicate tries a webhook again for about a minute where it is answered with an error."""

_LANGUAGES = {"Python": "python", "JavaScript": "javascript", "Webhook receiver": "python"}


def page(model: str, programs: Mapping[str, str]) -> str:
    """The programs as Markdown, and how agents call the model."""
    parts = [f"# Programs that call {model}\n\nThey read the token from `REPLICATE_API_TOKEN`.\n"]
    for title, program in programs.items():
        fence = "````" if "```" in program else "```"
        parts.append(f"## {title}\n\n{fence}{_LANGUAGES.get(title, 'bash')}\n{program}\n{fence}\n")
    parts.append(
        "## MCP\n\nAgents that speak MCP call it through Replicate's server at `https://mcp.replicate.com`, or through "
        f"the npm package `replicate-mcp` on their own machine. Tell them the name {model}.\n"
    )
    return "\n".join(parts)


def _curl(base: str, route: str, body: Mapping[str, Any], more: str = "") -> str:
    """For bash and zsh. The token goes through a file descriptor, as other users can read a command line."""
    lines = [
        f"curl -sS {shlex.quote(base.rstrip('/') + route)}",
        "-H @<(printf 'Authorization: Bearer %s' \"$REPLICATE_API_TOKEN\")",
        f"-H 'Content-Type: application/json' {more}".strip(),
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
    ]
    return " \\\n  ".join(lines)


def show(shipped: Shipped, model: str, programs: Mapping[str, str] | None, folder: Path, console: Console) -> None:
    """Print it.

    Args:
        shipped: the finished push.
        model: owner/name.
        programs: from `programs`; None where there is no input to show.
        folder: of the report.
        console: to print to.
    """
    address = str(shipped.model.get("url") or f"https://replicate.com/{model}")
    rows = {"playground": address, "version": shipped.version}
    if shipped.deployment:
        rows["deployment"] = shipped.deployment
    if shipped.cold_boot is not None:
        rows["cold boot"] = f"{shipped.cold_boot:.1f} s (wait of the first test prediction)"
    rows["tests"] = str(shipped.cost)
    console.print(Text.assemble("\n", (f"{model} is pushed.", "bold green")))
    for name, value in rows.items():
        console.print(Text.assemble((f"  {name:<12}", "dim"), value), soft_wrap=True)
    for note in shipped.notes:
        console.print(Text.assemble(("! ", "yellow"), note))
    console.print()
    console.print(times(shipped.steps))
    if programs is None:
        return
    title, program = next(iter(programs.items()))
    console.print(Text(f"\n{title}", "bold"))
    # No wrapping, so that programs can be copied.
    console.print(Text(program), soft_wrap=True)
    others = ", ".join(list(programs)[1:])
    console.print(Text(f"\n{others} and MCP are in:"))
    console.print(Text(f"  {folder / PROGRAMS}"), soft_wrap=True)
    console.print(
        Text(
            "\nReplicate's search finds only models with an example: run the first test on the playground's page, and "
            "keep that prediction as the example there."
        )
    )


def times(steps: Mapping[str, Mapping[str, Any]]) -> Table:
    """Each step's time."""
    table = Table("step", "seconds", "", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[1].justify = "right"
    for name, found in steps.items():
        table.add_row(name, f"{found['seconds']:.1f}", Text("done before" if found["before"] else "", "dim"))
    total = sum(found["seconds"] for found in steps.values() if not found["before"])
    table.add_row(Text("this push", "bold"), f"{total:.1f}")
    return table
