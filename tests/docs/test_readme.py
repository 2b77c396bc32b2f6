"""Every command and every block of code in the documents is run, and what they name is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from logit_cache.stages.app import main
from logit_cache.stages.options import read_recipe

from tests.conftest import REPOSITORY, TEXT
from tests.helpers.tiny import make_teacher

# In the order in which they are read: a later page goes on with the run of the README.
PAGES = ("README.md", "stages/README.md", "pipeline/README.md", "stages/recipes/README.md", "tests/README.md")
DOCUMENTS = sorted({*PAGES, *(str(file.relative_to(REPOSITORY)) for file in REPOSITORY.glob(".github/**/*.md"))})
# `make demo` in full takes a quarter of an hour; here it runs through on fewer, shorter rows and fewer steps.
SMALL_DEMO = " ".join(
    f"--set {override}"
    for override in (
        "corpus.row_length=64",
        "corpus.max_rows=8",
        "corpus.max_heldout_rows=2",
        "cache.shard_rows=4",
        "cache.heldout_k=64",
        "train.steps=2",
        "train.layers=2",
    )
)


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def shell(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("page", DOCUMENTS)
def test_blocks_are_of_a_kind_that_is_run(page: str) -> None:
    """bash, toml and python are run; text is not: output, drawings, and what needs a cluster."""
    languages = re.findall(r"^ *```(.*)$", text_of(page), flags=re.MULTILINE)[::2]
    assert set(languages) <= {"bash", "toml", "python", "text"}
    for command in commands(page):
        assert command.startswith(("make ", "logit-cache ")), command
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in (REPOSITORY / "Makefile").read_text(), command


@pytest.mark.slow
def test_all_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe, commands and Python of all pages, page after page, with a teacher of 30 small layers.

    The commands run in this process, each of which would else import for ten seconds; in one of its own each runs in `make demo`.
    """
    make_teacher(tmp_path / "my-teacher", words=1000, layers=30)
    (tmp_path / "texts").mkdir()
    for number in range(8):
        words = " ".join(f"w{(number * 37 + place * place) % 999 + 1}" for place in range(400))
        (tmp_path / "texts" / f"{number}.txt").write_text(words)
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        with Path("my.toml").open("a") as recipe:  # the first page begins it, later ones add to it
            recipe.writelines(blocks(page, "toml"))
        for command in commands(page):
            if command.startswith("logit-cache "):
                assert main(command.split()[1:]) == 0, f"{page}: {command}"
        if blocks(page, "python"):
            shell([sys.executable, "-c", "\n".join(blocks(page, "python"))], tmp_path)


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    """`make demo`, twice: the second time everything is found done."""
    # A checkout of its own, so that runs/ of this one is left alone.
    for name in ("Makefile", "pyproject.toml", ".src", "pipeline", "stages", "README.md"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "runs/text").mkdir(parents=True)
    (tmp_path / "runs/text" / TEXT.name).symlink_to(TEXT)
    # -o: this environment is as installed, however the checkout's files are dated.
    make = ["make", "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", f"SET={SMALL_DEMO}"]
    first = shell(make, tmp_path)
    assert (tmp_path / "runs/demo/report/index.html").exists()
    lines = [line.split()[0] for line in first.splitlines() if line.strip()]
    for name in ("teacher", "student", "control"):
        assert lines.count(name) == 2, f"the table has no line for {name}"
    again = shell(make, tmp_path)
    assert "runs/demo/cache: done, " in again
    assert again.count("done") >= 4


def test_make_help() -> None:
    shown = shell(["make", "--no-print-directory", "help"], REPOSITORY)
    targets = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert targets is not None
    for target in targets[1].split():
        assert f"make {target} " in shown, f"{target} has no line in make help"


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (REPOSITORY / "stages/recipes").glob("*.toml")))
def test_shipped_recipes_load(recipe: str) -> None:
    assert read_recipe(recipe, None).students
    assert f"[{recipe}]({recipe}.toml)" in text_of("stages/recipes/README.md")


def test_the_first_page_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", DOCUMENTS)
def test_lines_are_short(page: str) -> None:
    long = [number for number, line in enumerate(text_of(page).splitlines(), 1) if len(line) > 120]
    assert not long, f"{page}: lines {long} have more than 120 characters"


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {target}"


@pytest.mark.parametrize("page", DOCUMENTS)
def test_named_files_exist(page: str) -> None:
    """What a document calls by a name like `store/codec.py` is a file of the page's folder, of the library, or of the project."""
    names = re.findall(r"`([\w./-]+\.(?:py|j2|md|c)|(?:tests|stages|pipeline|\.src|\.github)/[\w./-]*)`", text_of(page))
    places = ((REPOSITORY / page).parent, REPOSITORY / "pipeline", REPOSITORY)
    for name in names:
        assert any((place / name).exists() for place in places), f"{page}: {name}"


def test_commands_are_all_listed() -> None:
    from logit_cache.stages.app import app

    table = text_of("stages/README.md").partition("## Commands")[2].partition("```")[0]
    named = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert named == set(re.findall(r"^\| `([a-z-]+)", table, flags=re.MULTILINE))


def test_shape_suffixes_are_in_the_legend() -> None:
    table = text_of("pipeline/README.md").partition("## Shape suffixes")[2].partition("\n## ")[0]
    legend = set(re.findall(r"^\| ([A-Z]) \|", table, flags=re.MULTILINE))
    for folder in ("pipeline", "stages"):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            for name, suffix in re.findall(r"\b([a-z]\w*_([A-Z]{1,4}))\b", file.read_text(encoding="utf-8")):
                assert set(suffix) <= legend, f"{file.relative_to(REPOSITORY)}: {name}"
