"""Report, comparison and score as pages in a real browser: no errors, nothing beside the screen, legible on both grounds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from logit_cache.stages.app import main

from tests.helpers.browser import READY, open_browser, open_page
from tests.helpers.tiny import make_recipe

pytestmark = pytest.mark.slow
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"
STUDENTS = {"student": {"mode": "cached"}, "control": {"mode": "ce"}}
SIZES = {"phone": (360, 700), "desk": (1280, 900)}
PAPER = 718
"""Width of A4 between its margins, in pixels."""
DARKEST_TEXT = """
() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = luminance(getComputedStyle(document.body).backgroundColor);
  const contrasts = [...document.querySelectorAll("figure svg text")].map((text) => {
    const [low, high] = [ground, luminance(getComputedStyle(text).fill)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
  return Math.min(...contrasts);
}
"""
OVERLAPS = """
() => {
  const blocks = [...document.querySelectorAll("main > *, .figures > figure, .facts > div")];
  const boxes = blocks.map((block) => [block, block.getBoundingClientRect()]).filter(([, box]) => box.height);
  const found = [];
  boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
    if (a.contains(b) || b.contains(a)) return;
    const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
    const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
    if (wide > 1 && high > 1) found.push([a.outerHTML.slice(0, 60), b.outerHTML.slice(0, 60)]);
  }));
  return found;
}
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three pages, of a run and of the same run with another seed."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = make_recipe(folder, students=STUDENTS, report={"title": HOSTILE})
    arguments = [str(recipe)]
    for command in ("prepare", "cache", "train", "evaluate", "report"):
        assert main([command, *arguments]) == 0
    again = folder / "again"
    shutil.copytree(folder / "run", again, ignore=shutil.ignore_patterns("final", "checkpoints", "*.jsonl", "run.json"))
    for command in ("train", "evaluate"):
        assert main([command, *arguments, "--set", "seed=1", "--set", f"run_dir={again}"]) == 0
    pages = {name: folder / f"{name}.html" for name in ("compare", "score")}
    assert main(["compare", str(folder / "run"), str(again), "--output", str(pages["compare"])]) == 0
    model = str(folder / "run/students/student/final")
    score = ["score", str(folder / "run/heldout"), model, "--device", "cpu", "--output", str(pages["score"])]
    assert main(score) == 0
    return {"report": folder / "run/report/index.html", **pages}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as found:
        yield found


@pytest.mark.parametrize("name", ["report", "compare", "score"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_a_page_fits_every_screen(name: str, size: str, ground: str, pages: dict[str, Path], browser: Any) -> None:
    width, height = SIZES[size]
    with open_page(browser, pages[name], viewport={"width": width, "height": height}, color_scheme=ground) as page:
        if name == "report":
            page.wait_for_selector(READY)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(DARKEST_TEXT) >= 4.5
        table = page.locator(".scroll > table").first
        assert table.evaluate("t => t.parentElement.scrollWidth >= t.scrollWidth")
        if (size, ground) == ("desk", "light"):
            page.emulate_media(media="print")
            page.set_viewport_size({"width": PAPER, "height": 1000})
            assert page.evaluate("document.documentElement.scrollWidth") <= PAPER


def test_pages_say_what_they_are_of(pages: dict[str, Path], browser: Any) -> None:
    with open_page(browser, pages["report"]) as page:
        page.wait_for_selector(READY)
        assert page.title() == HOSTILE and page.locator("h1").inner_text() == HOSTILE
        assert page.locator("main > .scroll table").first.locator("tbody tr").count() == 3
        first_screen = page.locator("main > .scroll").first.bounding_box()
        assert first_screen["y"] + first_screen["height"] < 720  # result and facts are seen without scrolling
        names = page.locator(".explorer .x-panel th").all_inner_texts()
        assert {"student", "control"} <= {name.strip() for name in names}
    with open_page(browser, pages["compare"]) as page:
        seeds = page.locator("main > .scroll").nth(1)
        assert seeds.locator("tbody tr").count() == 2 and "±" in seeds.inner_text()
    with open_page(browser, pages["score"]) as page:
        assert "±" in page.locator("main > .scroll").first.inner_text()
        assert page.locator("figure svg").count() == 2
