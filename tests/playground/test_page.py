"""The playground's page in a real Chromium, against the playground over the real Cog runtime."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.standins.localreplicate import javascript

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect  # noqa: E402

from cogpress.cog.process import Server, free_port  # noqa: E402
from tests import wait_until  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian and Ubuntu: apt install chromium)"),
]

RUNNER = """
import asyncio, json, sys
sys.path.insert(0, {root!r})
from typing import Optional
import cog
from cog import BaseRunner, ConcatenateIterator, Input
from cogpress.cog import streaming

class Runner(BaseRunner):
    def setup(self) -> None:
        streaming.install()

    async def pieces(self, text, pause):
        for at in range(0, len(text), 4):
            yield text[at : at + 4]
            await asyncio.sleep(pause)

    @cog.streaming
    @cog.concurrent(max=4)
    async def run(
        self,
        prompt: str = Input(description="What to say back.", default=""),
        system_prompt: Optional[str] = Input(description="Said before.", default=None),
        fields: Optional[str] = Input(
            description='Values, as a JSON object, such as {{"question": "how many", "columns": ["a", "b"]}}.',
            default=None,
        ),
        messages: Optional[str] = Input(description="A conversation, as a JSON list.", default=None),
        style: str = Input(description="How to say it.", default="plain", choices=["plain", "loud"]),
        pause: float = Input(description="Seconds after each piece.", default=0.0, ge=0.0, le=2.0),
        times: int = Input(description="How often to say it.", default=1, ge=1, le=50),
        exact: bool = Input(description="Whether to leave it as it is.", default=True),
        stop: str = Input(description="Ends it; several as a JSON list.", default=""),
        adapter: str = Input(description="Which adapter.", default=""),
        key: Optional[cog.Secret] = Input(description="Something that nobody may see.", default=None),
        picture: Optional[cog.Path] = Input(description="A file to measure.", default=None),
    ) -> ConcatenateIterator[str]:
        text = (system_prompt or "") + (fields or prompt) * times
        if messages:
            turns = [(turn["role"][0], turn["content"]) for turn in json.loads(messages)]
            if len(turns) < 3:  # as system_prompt and prompt
                text = "".join(said for role, said in turns if role == "s") + turns[-1][1] * times
            else:
                text = " ".join(role + ":" + said for role, said in turns) * times + "."
        if picture is not None:
            text += f"{{picture.stat().st_size}} bytes"
        if style == "loud":
            text = text.upper()
        if text == "fail":
            raise ValueError("This prompt cannot be answered.")
        print("saying", len(text), "characters")
        return streaming.stream(self.pieces({prefix!r} + text, pause))
"""

SLOW = {"prompt": "word ", "times": 40, "pause": 0.05}
"""An answer of fifty chunks in two and a half seconds."""

NOT_YET = "\u2013"

HOSTILE = (
    "<img src=x onerror=alert(1)></script><script>alert(2)</script> \u202egnp.exe\u202c \x1b[31mred\x1b[0m \u200b&amp;"
)

NASTY = [
    'it\'s "quoted" \\ back\\slash \\n not a newline\nand one\n\ttab',
    "$HOME `id` $(id) !! %s {x} ${y} #{z}",
    "üñí — 日本語 🎉 \u2028 line \u2029 paragraph \u202e bidi \ufeff bom",
    "'''\"\"\" ''' </script> <!-- -->\r\nJSON\nEOF\n",
    HOSTILE,
]
"""Texts that break careless quoting."""


# ---------------------------------------------------------------------------------------------------------------------
# A server, a browser
# ---------------------------------------------------------------------------------------------------------------------


def project(folder: Path, prefix: str = "") -> Path:
    (folder / "cog.yaml").write_text('build:\n  python_version: "3.12"\nrun: "predict.py:Runner"\n')
    (folder / "predict.py").write_text(RUNNER.format(root=str(ROOT), prefix=prefix))
    return folder


@pytest.fixture(scope="module")
def cogs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two Cog servers, which stand for two versions of a model: the older says `B: ` before everything."""
    servers: list[Server] = []
    try:
        for prefix in ("B: ", ""):  # the newest, which is given last, is the one that the page asks
            folder = project(tmp_path_factory.mktemp("cog"), prefix)
            server = Server(folder, log=folder / "server.log")
            server.start()
            servers.append(server)
        for server in servers:
            server.wait_ready(120)
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(scope="module")
def base(cogs: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from playground(cogs, tmp_path_factory.mktemp("playground"))


class Killed(Exception):
    """Thrown into `playground` to kill it as a crash would."""


def playground(cogs: list[Server], folder: Path, port: int = 0, **variables: str) -> Generator[str, None, None]:
    """`scripts/playground` as a user starts it, until it answers; its address."""
    port = port or free_port("127.0.0.1")
    models = [f"--model=talk={server.url}" for server in cogs]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "playground", *models, "--port", str(port), "--data", folder / "data"],
            stdout=output,
            stderr=output,
            env={**os.environ, **variables},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{address}/playground/api/config")
                break
            except httpx.HTTPError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield address
    except Killed:
        process.kill()
        process.wait(120)
        yield ""
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    sync_api.expect.set_options(timeout=60_000)  # a busy machine draws late
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


Opener = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, base: str) -> Iterator[Opener]:
    """Open a path in a new browser context; none may have logged an error at the end."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def opened(path: str = "/", at: str = base, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if local(request.url, at) else wrong.append(request.url))
        page.goto(at + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def local(url: str, base: str) -> bool:
    return url.startswith((f"{base}/", f"blob:{base}/", "data:"))


def field(page: Page, name: str) -> Locator:
    return page.locator(f"#input-{name}")


def unfold(page: Page) -> None:
    folded = page.locator("details.folded:not([open]) > summary")
    while folded.count():
        folded.first.click()


def fill(page: Page, **inputs: Any) -> None:
    field(page, "prompt").wait_for()
    if set(inputs) - {"prompt"}:
        unfold(page)
    for name, value in inputs.items():
        control = field(page, name)
        if control.evaluate("control => control.tagName") == "SELECT":
            control.select_option(str(value))
        else:
            control.fill(str(value))


def run(page: Page, wait: bool = True, **inputs: Any) -> None:
    fill(page, **inputs)
    page.get_by_role("button", name=re.compile("^Run")).click()
    if wait:
        finished(page)


def finished(page: Page, state: str = "succeeded") -> None:
    page.locator(f'article[data-status="{state}"]').first.wait_for()


def output(page: Page) -> Locator:
    return page.get_by_test_id("output")


def shown(page: Page) -> str:
    """The visible output, without the names of invisible characters."""
    return str(output(page).text_content())


def ask(base: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """A finished prediction, made through the API."""
    version = versions(base)[0]
    answer = httpx.post(
        f"{base}/v1/predictions", json={"version": version, "input": inputs}, headers={"Prefer": "wait"}, timeout=60
    )
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    assert made["status"] == "succeeded", made
    return made


def versions(base: str) -> list[str]:
    """The versions of the one model, in the page's order."""
    [model] = httpx.get(f"{base}/playground/api/config").json()["models"]
    return [version["id"] for version in model["versions"]]


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


def test_the_form_is_made_from_the_schema(visit: Opener) -> None:
    page = visit()
    field(page, "prompt").wait_for()
    for folded in ("system_prompt", "fields", "key", "picture", "style", "pause"):
        expect(field(page, folded)).to_be_hidden()
    unfold(page)
    names = page.eval_on_selector_all(".form .field-head code", "codes => codes.map((code) => code.textContent)")
    assert names == [  # the question, then what may stay empty, then settings; each in the model's order
        *("prompt", "system_prompt", "fields", "messages", "adapter", "key", "picture"),
        *("style", "pause", "times", "exact", "stop"),
    ]
    assert page.locator('label[for="input-system_prompt"]').inner_text() == "System prompt"
    assert field(page, "style").locator("option").all_inner_texts() == ["plain", "loud"]
    assert field(page, "times").input_value() == "1"
    assert field(page, "exact").is_checked()
    assert field(page, "key").get_attribute("type") == "password"
    assert field(page, "picture").get_attribute("type") == "file"
    assert field(page, "adapter").get_attribute("type") == "text", "a name has one line"
    described = field(page, "prompt").get_attribute("aria-describedby")
    assert page.locator(f"#{described}").inner_text() == "What to say back."

    field(page, "times").fill("51")
    field(page, "pause").fill("-1")
    page.get_by_role("button", name=re.compile("^Run")).click()
    assert page.locator("#input-times-problem").inner_text() == "must be at most 50"
    assert page.locator("#input-pause-problem").inner_text() == "must be at least 0"
    assert page.evaluate("document.activeElement.id") == "input-pause"
    assert page.url.endswith("/")  # nothing was sent


def test_json_is_checked_while_it_is_typed(visit: Opener) -> None:
    page = visit()
    fill(page, fields='{\n  "question": "how many",\n  "columns": [1, 2,]\n}')
    problem = page.locator("#input-fields-problem")
    assert problem.inner_text() == "line 3, column 19: no comma before ]"
    field(page, "fields").fill("[1]")
    assert problem.inner_text() == "line 1, column 1: must be an object: { … }"
    field(page, "fields").fill('{"question": "x"}')
    expect(problem).to_have_count(0)
    field(page, "fields").fill("")
    page.get_by_role("button", name="Start from an example").click()
    assert json.loads(field(page, "fields").input_value()) == {"question": "how many", "columns": ["a", "b"]}
    # Where plain text is fine too, only what begins like JSON is checked.
    field(page, "stop").fill("END")
    expect(page.locator("#input-stop-problem")).to_have_count(0)
    field(page, "stop").fill('["END"')
    expect(page.locator("#input-stop-problem")).to_contain_text("never closed")


def test_text_is_shown_while_it_is_written(visit: Opener) -> None:
    page = visit()
    run(page, wait=False, **{**SLOW, "pause": 0.1})
    expect(output(page)).to_contain_text("word word word")
    early = shown(page)
    assert page.locator("article").get_attribute("data-status") == "processing"
    assert 0 < len(early) < 200
    figures = page.locator(".figures dd").all_inner_texts()
    assert all(figure != NOT_YET for figure in figures), figures
    assert page.locator(".arrivals").is_visible()
    finished(page)
    assert shown(page) == "word " * 40
    [first, rate, tokens, _time] = page.locator(".figures dd").all_inner_texts()
    assert first.endswith("ms")
    assert 0 < float(rate) < 50  # a piece every 100 ms; how evenly they arrive is the machine's
    assert tokens == "50"
    page.get_by_role("tab", name="Logs").click()
    expect(page.locator(".logs")).to_contain_text("saying 200 characters")
    page.get_by_role("tab", name="Metrics").click()
    expect(page.locator(".metrics")).to_contain_text("predict_time")


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_cancel_stops_at_once_and_keeps_what_was_written(visit: Opener, base: str, way: str) -> None:
    page = visit()
    run(page, wait=False, **{**SLOW, "times": 50, "pause": 0.2})
    expect(output(page)).to_contain_text("word")
    if way == "button":
        page.get_by_role("button", name=re.compile("^Cancel")).first.click()
    else:
        page.keyboard.press("Escape")
    finished(page, "canceled")
    assert shown(page).startswith("word")
    expect(page.get_by_role("button", name=re.compile("^Run"))).to_be_visible()
    identifier = page.url.rpartition("/")[2]
    assert httpx.get(f"{base}/v1/predictions/{identifier}").json()["status"] == "canceled"


def test_a_failure_says_why(visit: Opener) -> None:
    page = visit()
    run(page, wait=False, prompt="fail")
    finished(page, "failed")
    expect(page.get_by_role("alert")).to_contain_text("This prompt cannot be answered.")
    expect(page.locator(".rating")).to_have_count(0)  # there is no answer to rate


def test_json_answers_are_laid_out_and_can_be_seen_as_they_came(visit: Opener) -> None:
    page = visit()
    answer = '{"calculations":[{"op":"P95","column":"kafka.lag"}],"limit":9223372036854775807,"ratio":1.0}'
    run(page, prompt=answer)
    expect(output(page)).to_have_class(re.compile("is-json"))
    assert shown(page).splitlines()[1] == '  "calculations": [{"op": "P95", "column": "kafka.lag"}],'
    assert "9223372036854775807" in shown(page)  # as it was written, which JSON.parse would not keep
    assert "1.0" in shown(page)
    page.get_by_role("button", name="Show raw").click()
    assert shown(page) == answer


def test_files_and_secrets_are_sent_and_secrets_are_in_no_code(visit: Opener, tmp_path: Path) -> None:
    page = visit()
    fill(page, prompt="It has ", key="s3cret-key")
    (tmp_path / "picture.bin").write_bytes(b"x" * 1234)
    (tmp_path / "large.bin").write_bytes(b"y" * 400_000)
    field(page, "picture").set_input_files(tmp_path / "picture.bin")
    expect(page.locator(".file [role=status]")).to_contain_text("1,234 bytes")
    run(page)
    assert shown(page) == "It has 1234 bytes"
    page.get_by_role("tab", name="Code").click()
    code = page.get_by_test_id("code").text_content() or ""
    assert "s3cret" not in code
    assert 'os.environ["KEY"]' in code
    field(page, "picture").set_input_files(tmp_path / "large.bin")
    expect(page.locator(".file [role=status]")).to_contain_text("400,000 bytes")
    page.get_by_role("button", name=re.compile("^Run")).click()
    page.get_by_role("tab", name="Output").click()
    expect(output(page)).to_have_text("It has 400000 bytes")


def test_a_long_answer_is_followed_until_the_reader_scrolls_away(visit: Opener) -> None:
    page = visit(viewport={"width": 1100, "height": 500})
    run(page, wait=False, prompt="line\n" * 30, times="12", pause="0.02")
    pane = page.locator(".answers")
    assert wait_until(lambda: pane.evaluate("pane => pane.scrollTop") > 200)
    pane.evaluate("pane => pane.scrollTo(0, 0)")
    before = len(shown(page))
    assert wait_until(lambda: len(shown(page)) > before + 40)
    assert pane.evaluate("pane => pane.scrollTop") == 0
    page.keyboard.press("Escape")
    finished(page, "canceled")


def test_a_prediction_that_still_runs_is_followed_from_its_permalink(visit: Opener) -> None:
    first = visit()
    run(first, wait=False, **{**SLOW, "pause": 0.2})  # a busy machine may take seconds to open the second page
    expect(output(first)).to_contain_text("word word")
    second = visit(first.url[first.url.index("/p/") :])
    expect(output(second)).to_contain_text("word word")
    assert second.locator("article").get_attribute("data-status") in ("starting", "processing")
    finished(second)
    assert shown(second) == "word " * 40


# ---------------------------------------------------------------------------------------------------------------------
# The template's own fields
# ---------------------------------------------------------------------------------------------------------------------

ASKED = """
import sys
from typing import Optional
sys.path.insert(0, {root!r})
from cog import BaseRunner, Input

class Runner(BaseRunner):
    def run(
        self,
        question: Optional[str] = Input(description="What to look up.", default=None),
        columns: Optional[str] = Input(description="What may be used. One per line, or with commas.", default=None),
        max_tokens: int = Input(description="Maximum number of tokens.", default=512, ge=1, le=4096),
        prompt: str = Input(description="Text to send to the model.", default=""),
    ) -> str:
        return repr([question, columns, prompt])
"""


def test_the_form_opens_with_the_example_of_the_template(
    visit: Opener, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """model.yaml's `prompt.fields` names them; the runner is another, so that no model is needed."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "cog.yaml").write_text('build:\n  python_version: "3.12"\nrun: "predict.py:Runner"\n')
    (folder / "predict.py").write_text(ASKED.format(root=str(ROOT)))
    with Server(folder, log=folder / "server.log") as server:
        server.wait_ready(120)
        opened = playground([server], tmp_path_factory.mktemp("playground"))
        address = next(opened)
        for width in (1100, 390):
            page = visit(at=address, viewport={"width": width, "height": 900})
            expect(field(page, "question")).to_have_value("10 player.uid with the highest p95 of agent.idle")
            columns = re.compile("agent.util\ncart.uid\n.*\npayment.card", re.DOTALL)
            expect(field(page, "columns")).to_have_value(columns)
            assert int(field(page, "columns").get_attribute("rows") or 0) >= 5
            expect(field(page, "question")).to_be_visible()
            expect(field(page, "columns")).to_be_visible()
            # What replaces the fields is for programs, and no setting.
            expect(page.locator("details", has_text="More options").locator("#input-prompt")).to_have_count(1)
            page.get_by_role("button", name=re.compile("^Run")).first.click()
            expect(output(page)).to_contain_text("'agent.util\\ncart.uid")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        opened.close()


# ---------------------------------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------------------------------


def say(page: Page, text: str) -> None:
    page.locator("#composer").fill(text)
    page.locator("#composer").press("Enter")


def replies(page: Page) -> Locator:
    """The answers that have ended, by their texts."""
    return page.locator('.reply[aria-busy="false"] .turn-text')


def test_a_conversation_has_turns_that_are_stopped_regenerated_and_edited(visit: Opener, base: str) -> None:
    page = visit()
    page.get_by_role("link", name="Chat", exact=True).click()
    page.get_by_label("System text").fill("Be brief.")
    say(page, "one")
    expect(replies(page)).to_have_text(["Be brief.one"])
    expect(page.locator(".reply .turn-who")).to_have_text(re.compile(r"^talk · 127\.0\.0\.1:\d+$"))
    say(page, "two")
    both = "s:Be brief. u:one a:Be brief.one u:two."
    expect(replies(page)).to_have_text(["Be brief.one", both])
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".turn")).to_have_count(4)
    expect(replies(page)).to_have_text(["Be brief.one", both])

    page.locator(".asked").nth(1).get_by_role("button", name="Edit").click()
    expect(page.locator("#composer")).to_have_value("two")
    expect(page.locator(".turn")).to_have_count(2)
    unfold(page)
    field(page, "pause").fill("0.2")
    field(page, "times").fill("51")
    page.locator("#composer").press("Enter")
    expect(page.locator("#composer-hint")).to_have_text("Times must be at most 50.")
    expect(page.get_by_role("button", name="Regenerate")).to_be_disabled()
    field(page, "times").fill("20")
    page.locator("#composer").press("Shift+Enter")
    page.locator("#composer").press("End")
    page.keyboard.type("and three")
    page.locator("#composer").press("Enter")
    expect(page.locator(".reply").nth(1)).to_contain_text("s:Be b")
    page.get_by_role("button", name=re.compile("^Stop")).click()
    expect(page.locator(".reply").nth(1)).to_contain_text("Canceled; this is the output so far.")
    assert page.locator(".asked .turn-text").nth(1).inner_text() == "two\nand three"

    # What was written is part of the conversation; the form and the history are not disturbed.
    field(page, "times").fill("1")
    field(page, "pause").fill("0")
    say(page, "four")
    expect(replies(page).nth(2)).to_contain_text(re.compile(r"u:two\nand three a:s:Be b.* u:four\.$", re.DOTALL))
    page.locator(".reply").nth(2).get_by_role("link", name="Details").click()
    finished(page)
    expect(output(page)).to_contain_text("u:four.")
    page.get_by_role("link", name="Chat", exact=True).click()
    expect(page.locator(".turn")).to_have_count(6)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "composer"


def test_a_failed_answer_is_tried_again_and_a_permalink_goes_on_as_a_chat(visit: Opener) -> None:
    page = visit("/?view=chat", viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    say(page, "fail")
    expect(page.get_by_role("alert")).to_have_text("ValueError: This prompt cannot be answered.")
    page.locator("#composer").fill("more")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(page.locator("#composer-hint")).to_contain_text("Try again, or edit your text.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_text("ValueError: This prompt cannot be answered.")
    page.get_by_role("button", name="Edit").click()
    say(page, HOSTILE)
    expect(replies(page)).to_contain_text("onerror=alert(1)")
    page.get_by_role("link", name="Details").click()
    finished(page)
    address = page.url
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    colleague = visit(address.partition("/p/")[1] + address.partition("/p/")[2])
    finished(colleague)
    colleague.get_by_role("button", name="Continue as a chat").click()
    expect(replies(colleague)).to_have_count(1)
    say(colleague, "and on")
    expect(replies(colleague).nth(1)).to_contain_text("u:and on.")


# ---------------------------------------------------------------------------------------------------------------------
# Showing each other
# ---------------------------------------------------------------------------------------------------------------------


def test_a_permalink_opens_input_and_output_in_another_browser(visit: Opener) -> None:
    first = visit()
    run(first, prompt="for a colleague\nin two lines", system_prompt="Dear ", times="2")
    link = first.url
    assert re.search(r"/p/\w+$", link)
    second = visit(link.removeprefix(link.rpartition("/p/")[0]))
    expect(output(second)).to_have_text("Dear for a colleague\nin two linesfor a colleague\nin two lines")
    assert field(second, "prompt").input_value() == "for a colleague\nin two lines"
    expect(field(second, "system_prompt")).to_be_visible()  # an optional input that was used is not hidden
    assert field(second, "system_prompt").input_value() == "Dear "
    assert field(second, "times").input_value() == "2"


def test_a_permalink_of_what_is_gone_says_so(visit: Opener, browser: Browser, base: str) -> None:
    context = browser.new_context()  # whose console may tell of the 404
    page = context.new_page()
    for name in ("0123456789abcdefghjkmnpqrs", "0123%E0%A4"):  # the other was cut off
        page.goto(f"{base}/p/{name}")
        expect(page.locator(".answers")).to_contain_text("There is no such prediction. It was deleted")
    expect(field(page, "prompt")).to_be_visible()  # and another can be asked
    context.close()


def test_a_lost_connection_is_said_and_what_came_of_it(browser: Browser, cogs: list[Server], tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    context = browser.new_context()  # whose console may tell of what does not answer
    page = context.new_page()
    page.set_default_timeout(15_000)
    first = playground(cogs, tmp_path, port=port)
    page.goto(next(first))
    run(page, wait=False, prompt="some words of which not all will come", times="50", pause="0.2")
    assert wait_until(lambda: len(shown(page)) > 20)
    first.throw(Killed)
    expect(page.locator(".answer")).to_contain_text("Connection lost; reconnecting")
    assert len(shown(page)) > 20  # what had come stays
    second = playground(cogs, tmp_path, port=port)
    next(second)
    finished(page, "failed")
    expect(page.locator(".answer")).to_contain_text("The playground ended while this was waiting or running")
    expect(page.locator(".answer")).not_to_contain_text("Connection lost")
    run(page, prompt="as before", times="1", pause="0")
    expect(output(page)).to_have_text("as before")
    context.close()
    second.close()


def test_tweak_and_rerun_then_compare(visit: Opener) -> None:
    page = visit()
    run(page, prompt="the quick brown fox")
    before = page.url
    page.get_by_role("button", name="Tweak and rerun").click()
    assert page.evaluate("document.activeElement.id") == "input-prompt"
    run(page, prompt="the quick red fox")
    expect(output(page)).to_have_text("the quick red fox")
    assert page.url != before
    page.get_by_role("link", name="Compare with the previous answer").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The outputs differ; one input differs")
    assert page.locator(".compare-row .compare-name").all_inner_texts() == ["prompt"]
    assert page.locator(".outputs del").all_inner_texts() == ["brown"]
    assert page.locator(".outputs ins").all_inner_texts() == ["red"]
    page.go_back()
    expect(output(page)).to_have_text("the quick red fox")
    page.go_back()
    expect(output(page)).to_have_text("the quick brown fox")
    assert field(page, "prompt").input_value() == "the quick brown fox"


def test_two_versions_stream_side_by_side(visit: Opener) -> None:
    page = visit()
    page.get_by_role("button", name="Compare with a second model").click()
    run(page, wait=False, **SLOW)
    both = page.locator("article")
    expect(both).to_have_count(2)
    for text in (output(page).nth(0), output(page).nth(1)):
        expect(text).to_contain_text("word word")
    assert [one.get_attribute("data-status") for one in both.all()] == ["processing"] * 2  # both at once
    page.get_by_role("link", name="Mark the differences").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The outputs differ; the inputs are the same")
    marked = page.locator(".outputs del, .outputs ins").all_inner_texts()
    assert "".join(marked).strip() == "B:"


def test_rating_and_export_close_the_loop(visit: Opener, base: str, tmp_path: Path) -> None:
    from cogpress.data.prepare import read_examples

    page = visit()
    run(page, prompt="a good one")
    page.get_by_role("button", name="Good").click()
    expect(page.locator(".rating-state")).to_have_text("Saved")
    run(page, prompt="a bad one")
    page.get_by_role("button", name="Bad").click()
    page.get_by_label("Note").fill("the word is wrong")
    page.get_by_label("The right answer").fill("a better one")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".rating-state")).to_have_text("Saved")
    run(page, prompt="a bad one without the right one")
    page.get_by_role("button", name="Bad").click()
    expect(page.locator(".rating-state")).to_have_text("Saved")
    page.reload()
    expect(page.get_by_role("button", name="Bad")).to_have_attribute("aria-pressed", "true")

    page.get_by_role("link", name="History").click()
    page.get_by_label("Rating").select_option("bad")
    expect(page.locator(".row")).to_have_count(2)
    expect(page.locator(".row").nth(1)).to_contain_text("the word is wrong")
    page.locator("summary", has_text="Export rated").click()
    with page.expect_download() as downloading:
        page.get_by_role("button", name="All rated answers").click()
    downloading.value.save_as(tmp_path / "rated.jsonl")
    expect(page.locator(".export")).to_contain_text("2 examples exported; 1 left out")
    rows = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": "a good one", "completion": "a good one"},
        {"prompt": "a bad one", "completion": "a better one"},
    ]
    reading = read_examples(tmp_path / "rated.jsonl")
    assert (len(reading.examples), reading.problems) == (2, [])


def test_hostile_output_is_only_text(visit: Opener) -> None:
    page = visit()
    run(page, prompt=HOSTILE)
    assert output(page).locator("img, script").count() == 0
    assert "<img src=x onerror=alert(1)></script>" in shown(page)
    assert "&amp;" in shown(page)
    assert output(page).locator(".unseen").all_inner_texts() == ["U+202E", "U+202C", "ESC", "ESC", "U+200B"]
    for tab in ("Code", "Logs", "Metrics"):
        page.get_by_role("tab", name=tab).click()
    page.get_by_role("link", name="History").click()
    expect(page.locator(".row").first).to_contain_text("<img src=x")
    page.locator(".row-mark").nth(0).check()
    page.locator(".row-mark").nth(1).check()
    page.get_by_role("link", name="Compare", exact=True).click()
    expect(page.locator(".outputs")).to_contain_text("</script>")
    assert page.locator("main img, main script").count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# History
# ---------------------------------------------------------------------------------------------------------------------


def test_many_predictions_are_paged_and_searched(visit: Opener, base: str) -> None:
    version = versions(base)[0]
    with httpx.Client(base_url=base, timeout=60) as http:
        for number in range(200):
            body = {"version": version, "input": {"prompt": f"question {number} needle{number % 100:03}"}}
            assert http.post("/v1/predictions", json=body).is_success

        def ended() -> bool:
            params = {"q": "question", "status": "succeeded"}
            return int(http.get("/playground/api/history", params=params).json()["total"]) >= 200

        assert wait_until(ended)
    page = visit("/?view=history&q=question")
    rows = page.locator(".row")
    expect(rows).to_have_count(50)
    expect(page.locator(".history-total")).to_have_text("200 found")
    while rows.count() < 200:
        before = rows.count()
        page.get_by_role("button", name="Show more").click()
        expect(rows).to_have_count(before + 50)
    page.get_by_label("Search").fill("needle023")
    expect(rows).to_have_count(2)
    assert "q=needle023" in page.url  # a search can be sent to a colleague, too
    page.get_by_label("Status").select_option("failed")
    expect(page.get_by_text("No predictions match these filters.")).to_be_visible()


# ---------------------------------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """The packages of tests/js, Replicate's own JavaScript client among them."""
    return javascript() / "node_modules"


def program(page: Page, language: str) -> str:
    page.get_by_role("tab", name="Code").click()
    page.get_by_role("tab", name=language, exact=True).click()
    page.get_by_role("button", name="Copy code").click()
    return str(page.evaluate("navigator.clipboard.readText()"))


def done(command: list[str], text: str = "", cwd: Path | None = None) -> str:
    variables = {**os.environ, "REPLICATE_API_TOKEN": "r8_not_needed_here", "PYTHONUTF8": "1"}
    finished = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, cwd=cwd, env=variables)
    assert finished.returncode == 0, finished.stderr.decode()
    return finished.stdout.decode()


RUN_ALL = {
    ".py": "import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path)\n    print(end='\\0')",
    ".mjs": "for (const path of process.argv.slice(1)) { await import(path); process.stdout.write('\\0'); }",
}
"""Runs programs one after the other, with a NUL after the output of each."""


@pytest.mark.parametrize("language", ["Python", "JavaScript", "curl", "HTTP stream", "OpenAI client"])
def test_the_code_on_screen_runs_and_gives_the_output_on_screen(
    visit: Opener, language: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    # A textarea makes one line break of \r\n, as HTML demands.
    texts = [text.replace("\r\n", "\n") for text in NASTY]
    texts += ["".join(texts)]
    codes = []
    for text in texts:
        run(page, prompt=text, times="2")
        expect(output(page)).not_to_have_text("")
        codes.append(program(page, language))
        assert "REPLICATE_API_TOKEN" in codes[-1]
        page.get_by_role("tab", name="Output").click()
    if language == "curl":
        said = ["".join(json.loads(done(["bash"], code))["output"]) for code in codes]
    elif language == "HTTP stream":
        said = [streamed(done(["bash"], code)) for code in codes]
    else:
        kind = ".mjs" if language == "JavaScript" else ".py"
        paths = [tmp_path / f"{number}{kind}" for number in range(len(codes))]
        for path, code in zip(paths, codes, strict=True):
            path.write_text(code, encoding="utf-8")
        command = [sys.executable, "-c", RUN_ALL[kind]]
        if language == "JavaScript":
            (tmp_path / "node_modules").symlink_to(request.getfixturevalue("node_modules"))
            command = ["node", "--input-type=module", "-e", RUN_ALL[kind]]
        said = done([*command, *map(str, paths)]).split("\n\0")[:-1]
    # Replicate's client ends lines at these, so it is sent a line break; OpenAI's gets them as they are.
    expected = [re.sub("[\u2028\u2029]", "\n", text) if language == "Python" else text for text in texts]
    assert said == [text * 2 for text in expected]


def test_what_has_no_word_in_the_openai_api_is_sent_all_the_same(visit: Opener, tmp_path: Path) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    asked = {"fields": '{"question": "it\'s"}', "system_prompt": "So: ", "style": "loud", "times": "2"}
    run(page, **asked)
    assert shown(page) == 'SO: {"QUESTION": "IT\'S"}{"QUESTION": "IT\'S"}'
    code = program(page, "OpenAI client")
    assert "client.completions.create" in code
    (tmp_path / "answer.py").write_text(code, encoding="utf-8")
    assert done([sys.executable, str(tmp_path / "answer.py")]) == 'SO: {"QUESTION": "IT\'S"}{"QUESTION": "IT\'S"}\n'


def streamed(events: str) -> str:
    """The text of a stream of server-sent events."""
    pieces = []
    for event in events.replace("\r\n", "\n").split("\n\n"):
        lines = event.split("\n")
        if "event: output" in lines:
            pieces.append("\n".join(line.removeprefix("data: ") for line in lines if line.startswith("data:")))
    return "".join(pieces)


def test_every_value_survives_being_written_as_code(visit: Opener) -> None:
    """The literal functions, with a thousand random values that are hard to quote."""
    page = visit()
    chance = random.Random(7)
    parts = [
        "'",
        '"',
        "\\",
        "\n",
        "\r",
        "\t",
        "\0",
        "$",
        "`",
        "{",
        "}",
        "\u2028",
        "\u202e",
        "🎉",
        "é",
        "</script>",
        "#",
        " ",
    ]

    def value(depth: int = 0) -> Any:
        kind = chance.randrange(8 if depth < 3 else 5)
        if kind < 2:
            return "".join(chance.choices(parts, k=chance.randrange(12)))
        if kind == 2:
            return chance.choice([True, False, None])
        if kind == 3:
            return chance.randrange(-(2**53), 2**53)
        if kind == 4:
            return chance.choice([0.5, 1e-9, 1.5e300, -2.25])
        if kind == 5:
            return [value(depth + 1) for _ in range(chance.randrange(4))]
        return {"".join(chance.choices(parts, k=3)): value(depth + 1) for _ in range(chance.randrange(4))}

    values = [value() for _ in range(1000)]
    written = page.evaluate(
        """async (values) => {
          const { python, javascript, shell } = await import("/static/code.js");
          // CSP forbids to evaluate a text, so the JavaScript is parsed where it is JSON, as its strings are.
          return values.map((value) => [python(value), javascript(value), shell(JSON.stringify(value))]);
        }""",
        values,
    )
    for given, (python, _javascript, _shell) in zip(values, written, strict=True):
        assert ast.literal_eval(python) == given
        assert "\u202e" not in python  # nothing that reorders what a reader sees
    script = "".join(f"printf '%s\\0' {shell}\n" for _, _, shell in written)
    assert [json.loads(said) for said in done(["bash"], script).split("\0")[:-1]] == values
    node = shutil.which("node")
    if node:
        source = "const values = [\n" + ",\n".join(javascript for _, javascript, _ in written) + "];\n"
        said = done([node, "--input-type=module", "-"], source + "process.stdout.write(JSON.stringify(values));")
        assert json.loads(said) == values


WRONG = (
    ("", "1:1"),
    ("{", "1:2 expected a name in double quotes; the text ends here"),
    ('{"a": 1', "1:1 this { is never closed"),
    ('{"a": 1,}', "1:8 no comma before }"),
    ("{'a': 1}", "1:2 use double quotes"),
    ('{"a" 1}', "1:6 expected :"),
    ('{"a": tru}', "1:7 expected a value; found tru"),
    ('["a\nb"]', "1:4 write a line break in a string"),
    ('["\\x"]', "1:3 not a valid escape"),
    ('["abc', "1:2 this string has no closing quote"),
    ("[1] 2", "1:5 nothing may follow"),
    ("[01]", "1:3 expected a comma or ]"),
    ("\n\n  [1\n  2]", "4:3 expected a comma or ]"),
    ("[" * 100_000, "nested too deeply"),
)
"""Texts, and where and why they are no JSON."""


def test_where_json_is_wrong(visit: Opener) -> None:
    said = visit().evaluate(
        """async (texts) => {
          const { problem } = await import("/static/json.js");
          return texts.map((text) => problem(text)).map(({ line, column, message }) => `${line}:${column} ${message}`);
        }""",
        [text for text, _ in WRONG],
    )
    for (text, place), told in zip(WRONG, said, strict=True):
        assert place in told, text[:20]


# ---------------------------------------------------------------------------------------------------------------------
# For everybody, everywhere
# ---------------------------------------------------------------------------------------------------------------------


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))


def test_everything_is_reached_by_keyboard(visit: Opener) -> None:
    page = visit()
    field(page, "prompt").wait_for()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the answer"
    expect(page.locator(".skip")).to_be_in_viewport()
    for _ in range(20):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", focused(page)
        if focused(page) == "input-prompt":
            break
    else:
        pytest.fail("the prompt is not reached")
    page.keyboard.type("by keyboard alone")
    page.keyboard.press("Control+Enter")
    finished(page)
    expect(page.locator("[aria-live]")).to_have_text("Done.")
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page) == "answer-output":
            break
    page.keyboard.press("ArrowRight")
    assert focused(page) == "answer-code"
    expect(page.get_by_test_id("code")).to_be_visible()
    page.keyboard.press("End")
    expect(page.locator(".metrics")).to_be_visible()
    # Every control has a name.
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, a[href], summary")]
          .filter((one) => !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()))
          .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("path", ["/", "/?view=history", "/p/{0}", "/compare?a={0}&b={1}"])
def test_a_phone_needs_no_sideways_scrolling(visit: Opener, base: str, path: str) -> None:
    long = {"prompt": "averyveryverylongwordwithoutanyspace" * 10 + '{"a": 1}'}
    ids = [ask(base, inputs)["id"] for inputs in (long, {"prompt": '{"list": [{"op": "P95", "column": "x"}]}'})]
    phone = {"width": 360, "height": 740}
    page = visit(path.format(*ids), viewport=phone, has_touch=True, is_mobile=True)
    page.locator(".field, .row, .side").first.wait_for()
    for code in ("Output", "Code", "Metrics") if path.startswith("/p/") else ():
        page.get_by_role("tab", name=code).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Large enough for a finger.
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, summary")]
          .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 24)
          .map((one) => one.outerHTML)"""
    )
    assert small == []


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, by WCAG's formula."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(visit: Opener, scheme: Any) -> None:
    page = visit(color_scheme=scheme)
    field(page, "prompt").wait_for()
    names = ["paper", "surface", "sunken", "tint", "bad-tint", "ink", "soft", "accent", "on-accent", "bad", "edge"]
    names += ["focus", "json-key", "json-string", "json-number"]
    colour = page.evaluate(
        """(names) => {
          const probe = document.querySelector("main");
          return Object.fromEntries(names.map((name) => {
            probe.style.color = `var(--${name})`;
            return [name, getComputedStyle(probe).color];
          }));
        }""",
        names,
    )
    assert (sum(map(int, re.findall(r"\d+", colour["paper"])[:3])) < 200) == (scheme == "dark")
    for ground in ("paper", "surface"):
        for text in ("ink", "soft", "accent", "bad", "json-key", "json-string", "json-number"):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        assert contrast(colour["edge"], colour[ground]) >= 3, ground
        assert contrast(colour["focus"], colour[ground]) >= 3, ground
    assert contrast(colour["on-accent"], colour["accent"]) >= 4.5
    for text, ground in (("ink", "tint"), ("accent", "tint"), ("bad", "bad-tint"), ("soft", "sunken")):
        assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)


def test_nothing_moves_for_those_who_want_it_so(visit: Opener) -> None:
    page = visit(reduced_motion="reduce")
    run(page, wait=False, **SLOW)
    expect(output(page)).to_contain_text("word")
    assert page.evaluate("document.getAnimations().length") == 0


def test_the_page_is_served_with_a_strict_policy(base: str) -> None:
    policy = httpx.get(base).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    page = ROOT / "cogpress" / "playground" / "page"
    index = (page / "index.html").read_text()
    assert not re.search(r"<style|style=|<script(?![^>]*src=)| on\w+=", index)
    ours = [path for path in page.rglob("*.js") if "vendor" not in path.parts]
    for path in ours:
        text = path.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text.split("\n", 3)[-1]
        ), path
        assert not re.search(r"https?://(?!127)", text.replace("https://…", "")), path
        assert text.startswith("// "), f"{path} does not say what it holds"
        assert len(text.splitlines()) <= 400, path


def test_a_token_is_asked_for_once_and_is_in_no_address(visit: Opener, cogs: list[Server], tmp_path: Path) -> None:
    token = "a-token-of-twenty-four-chars"
    for address in playground(cogs[1:], tmp_path, COGPRESS_TOKEN=token):
        page = visit(at=address)
        page.context.on("requestfailed", lambda _request: None)
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Continue").click()
        run(page, prompt="with a token")
        assert shown(page) == "with a token"
        assert token not in page.url
        page.get_by_role("tab", name="Code").click()
        assert token not in (page.get_by_test_id("code").text_content() or "")
        page.reload()
        expect(output(page)).to_have_text("with a token")
        page.get_by_role("link", name="Chat", exact=True).click()
        say(page, "hello")
        expect(replies(page)).to_have_text(["hello"])
        expect(page.locator(".reply .turn-who")).to_have_text("talk")  # of the only version, no address
        page.wait_for_load_state("networkidle")  # what it still asks for would find nobody
