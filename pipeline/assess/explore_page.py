"""The explorer's page: one file of HTML that loads nothing, and the same as a part of another page.

What comes from a corpus is JSON inside a script element that no browser runs, with every "<" escaped; the script puts it
into text nodes. A content security policy lets no other script run, whatever a page holds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .explore import Explored

_HERE = Path(__file__).parent
_PAGE_STYLE = """
body { margin: 0; padding: 0 clamp(.6rem, 2vw, 2rem) 1rem; font: 16px/1.5 system-ui, "Noto Sans", sans-serif;
  background: #ffffff; color: #14202b }
body:has(.explorer[data-theme="dark"]) { background: #11171c; color: #eef2f5 }
@media (prefers-color-scheme: dark) { body:not(:has(.explorer[data-theme="light"])) { background: #11171c; color: #eef2f5 } }
h1 { font-size: 1.35rem; margin: .8rem 0 0; overflow-wrap: anywhere } .page-note { margin: 0; opacity: .8; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Fragment:
    """An explorer as a part of a page. The page has `style` in one style element and, behind all markup, `script` in
    one script element, both once however many explorers there are, and allows them by `content_policy`."""

    markup: str
    style: str
    script: str


def explorer_fragment(explored: Explored) -> Fragment:
    """The explorer of some rows."""
    facts = _inert(json.dumps(explored.facts, ensure_ascii=False, separators=(",", ":")))
    data = base64.b64encode(explored.data).decode()
    scripts = (
        f'<script type="application/json" class="x-facts">{facts}</script>'
        f'<script type="text/plain" class="x-data">{data}</script>'
    )
    markup = _file("explorer.html").replace("</section>", f"{scripts}</section>")
    # In a function of its own, so that its names meet none of the page's.
    script = f'(() => {{\n"use strict";\n{_file("explorer_numbers.js")}\n{_file("explorer.js")}}})();'
    return Fragment(markup, _file("explorer.css"), script)


def explorer_page(explored: Explored) -> str:
    """The whole page."""
    fragment = explorer_fragment(explored)
    style = _PAGE_STYLE + fragment.style
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        _file("explore_page.html.j2")
    )
    return template.render(
        title=explored.facts["title"],
        note=f"What the teacher {explored.facts['teacher']} predicts, read from its cache.",
        policy=content_policy([fragment.script], [style]),
        style=style,
        script=fragment.script,
        markup=fragment.markup,
    )


def content_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The content security policy of a page that runs these scripts and applies these styles, as they stand between
    their tags, shows images of `data:` URLs, and loads nothing."""
    hashes = [" ".join(f"'sha256-{_sha256(text)}'" for text in texts) or "'none'" for texts in (scripts, styles)]
    return (
        f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inert(text: str) -> str:
    """JSON that ends no script element and begins no comment."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
