"""A real Chromium without a window, for tests of the pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
READY = '.explorer[data-ready="yes"]'


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of playwright.

    Skips the test where none is installed; under CI, or where NEED_BROWSER is set, that is an error.
    """
    needed = os.environ.get("CI") or os.environ.get("NEED_BROWSER")
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = f"no browser found: install one of {', '.join(_NAMES)}"
        if needed:
            pytest.fail(message)
        pytest.skip(message)
    if not needed:
        pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root; the pages are the tests' own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: Any, file: Path, link: str = "", *, expected: str | None = None, **settings: Any
) -> Iterator[Any]:
    """A page from a file, as a double click opens it; `settings` are those of `new_page`.

    Fails for any error on its console, any dialogue, and any request but that of the file itself; `expected` is a part of
    an error's text that must come.
    """
    page = browser.new_page(**settings)
    wrong: list[str] = []

    def refuse(dialog: Any) -> None:
        wrong.append(f"dialogue {dialog.message}")
        dialog.dismiss()

    page.set_default_timeout(60_000)
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", refuse)
    page.on("request", lambda request: None if request.url.startswith(file.as_uri()) else wrong.append(request.url))
    page.goto(f"{file.as_uri()}{link}")
    yield page
    page.close()
    found = [text for text in wrong if expected is not None and expected in text]
    assert (expected is None or found) and len(found) == len(wrong), wrong
