"""A browser for what is to be seen in one: Debian's chromium, driven by playwright.

    python -m tests.browser out/shapes/explorer.html explorer.png explorer-dark.png

makes the README's screenshots of the explorer.
"""
from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

LACKING = "this needs a browser and what drives it: apt install chromium; pip install playwright"


@contextlib.contextmanager
def launched() -> Iterator:
    """Chromium without a window, as playwright's Browser. Raises ImportError, with what to install,
    where one of them is missing."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        raise ImportError(LACKING)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def main(page: str, light: str, dark: str) -> None:
    with launched() as browser:
        pictures = (light, "light", "body", 1500), (dark, "dark", "#guidance", 1760)
        for path, scheme, first, height in pictures:
            size = {"width": 1600, "height": height}
            tab = browser.new_page(viewport=size, color_scheme=scheme)
            tab.goto(Path(page).resolve().as_uri())
            tab.wait_for_selector("body[data-ready]")
            tab.evaluate("first => document.querySelector(first).scrollIntoView()", first)
            tab.screenshot(path=path)
            tab.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m tests.browser PAGE LIGHT.png DARK.png")
    main(*sys.argv[1:])
