"""Pages of one family: the report of a run, students side by side, and the scores of models.

A page is one file that loads nothing. Its figures are SVG in the page's own colours, so that they are right on light and
dark grounds and in print.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

_HERE = Path(__file__).parent
_ENVIRONMENT = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    loader=jinja2.FileSystemLoader(_HERE, encoding="utf-8"),
    trim_blocks=True,
    keep_trailing_newline=True,
)


def render_page(name: str, title: str, *, style: str = "", script: str = "", **values: Any) -> bytes:
    """The page of the template NAME.html.j2 with its values; `style` and `script` are those of parts that it holds.

    A content security policy lets no other script run, whatever text a page holds.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    style = (_HERE / "page.css").read_text(encoding="utf-8") + style
    template = _ENVIRONMENT.get_template(f"{name}.html.j2")
    return template.render(title=title, policy=policy, style=style, script=script, **values).lstrip().encode()
