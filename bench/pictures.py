"""The playground's pictures in docs/: `.venv/bin/python -m bench.pictures runs/demo/weights`; needs Chromium.

The tuned weights answer the worked example's question, beside their base too, and the base converses.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from cogpress import config, http
from cogpress.cog.process import free_port
from cogpress.errors import CogpressError
from cogpress.weights import fetch

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600.0
"""For models to load and to answer."""

TALK = ("What is a load balancer?", "When would I need one?")


def main() -> None:
    """Start the playground with both models and take the pictures."""
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__)
    parser.add_argument("weights", type=Path, help="the tuned weights of the worked example")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the pictures (default: docs)")
    options = parser.parse_args()
    name = config.load(ROOT / "model.yaml").name
    base = fetch.base("embedded", ROOT / ".cache")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        with playground(ROOT, {f"{name}:base": base, f"{name}:tuned": options.weights}) as address:
            take(browser, address, ask, options.out / "playground.png")
            take(browser, address, compare, options.out / "playground-compare.png", dark=True)
        with playground(conversing(Path(folder) / "project"), {"assistant": base}) as address:
            take(browser, address, talk, options.out / "playground-chat.png")
        browser.close()


def take(browser: Browser, address: str, act: Callable[[Page], None], path: Path, *, dark: bool = False) -> None:
    """Open the page, do something there and take a picture of it."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme="dark" if dark else "light", device_scale_factor=1.25
    )
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    for _ in ("the first time loads the models", "the second is shown"):
        page.goto(address)
        act(page)
    page.mouse.move(0, 0)
    page.screenshot(path=path)
    print(path)
    context.close()


def conversing(root: Path) -> Path:
    """This project without a form of its own, so that its model converses."""
    root.mkdir()
    for name in ("cogpress", "requirements", "scripts"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("cog.yaml", "predict.py", "train.py"):
        shutil.copy(ROOT / name, root)
    for name in (".venv", ".cache"):
        (root / name).symlink_to(ROOT / name)
    (root / "model.yaml").write_text("name: assistant\n")
    subprocess.run([sys.executable, str(root / "scripts" / "form")], check=True, stdout=subprocess.DEVNULL)
    return root


@contextmanager
def playground(root: Path, models: dict[str, Path]) -> Iterator[str]:
    """The address of a project's playground with these models, the last of which is the page's first choice."""
    port = free_port("127.0.0.1")
    given = [f"--model={name}={folder}" for name, folder in models.items()]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / "scripts" / "playground"), *given, "--port", str(port), "--data", folder]
        process = subprocess.Popen(command)
        address = f"http://127.0.0.1:{port}"
        try:
            ends = time.monotonic() + SECONDS
            while not answers(address):
                if process.poll() is not None or time.monotonic() > ends:
                    raise CogpressError("The playground did not start; see above.")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait()


def answers(address: str) -> bool:
    """Whether the playground's page is served."""
    try:
        with http.connect(address, timeout=2.0) as client:
            return bool(client.get(f"{address}/playground/api/config").is_success)
    except httpx.HTTPError:
        return False


def ask(page: Page) -> None:
    """Run the form as it opens, with the example filled in."""
    page.locator(".form button.primary").click()
    done(page, 1)


def compare(page: Page) -> None:
    """Ask both versions the same."""
    page.get_by_text("Compare with a second model").click()
    shorten(page, 80)  # the base does not come to an end
    page.locator(".form button.primary").click()
    done(page, 2)


def talk(page: Page) -> None:
    """Two turns."""
    page.get_by_role("link", name="Chat").click()
    shorten(page, 100)
    for number, text in enumerate(TALK, 1):
        page.locator("#composer").fill(text)
        page.locator("#composer").press("Enter")
        page.locator('.reply[data-status="succeeded"]').nth(number - 1).wait_for()


def shorten(page: Page, tokens: int) -> None:
    """Limit the answers, in the folded settings."""
    page.get_by_text("Settings", exact=True).click()
    page.locator("#input-max_tokens").fill(str(tokens))
    page.get_by_text("Settings", exact=True).click()


def done(page: Page, count: int) -> None:
    """Wait until this many answers are there."""
    page.locator('article[data-status="succeeded"]').nth(count - 1).wait_for()


def chromium() -> str:
    """The system's Chromium."""
    for name in ("chromium", "chromium-browser"):
        if found := shutil.which(name):
            return found
    raise CogpressError("Chromium is not installed. On Debian and Ubuntu: apt install chromium.")


if __name__ == "__main__":
    main()
