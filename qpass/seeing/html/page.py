"""A page from a template and plain data. The data reach the browser as JSON and the document as text, never as markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qpass.printing import finite

_FOLDER = Path(__file__).parent
_SCRIPTS = {
    "diff": ("common.js", "tree.js", "details.js", "diff.js"),
    "report": ("common.js", "charts.js", "report.js"),
    "compare": ("common.js", "compare.js"),
}
#: What would end the element that the data lie in, or begin another.
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_NOTEBOOK_HEIGHT = 640


def page(kind: str, title: str, data: Any, path: str | Path | None = None) -> str:
    """The page `kind` (a key of _SCRIPTS) of `data`, which json.dumps takes. Written to `path`, if given, whole or not at all.

    Numbers that are not finite arrive as null. Raises `OSError` if the file cannot be written.
    """
    style, script = _file("style.css"), "\n".join(_file(name) for name in _SCRIPTS[kind])
    text = _templates().get_template(f"{kind}.html.j2").render(
        title=title, style=style, script=script, policy=_policy(style, script), data=as_script_data(data)
    )  # fmt: skip
    if path is not None:
        _write(Path(path), text)
    return text


def as_script_data(data: Any) -> str:
    """JSON in ASCII that can stand in a <script> element: no name in it can end that."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False).translate(_UNSAFE)


def in_notebook(text: str) -> str:
    """The page in a frame of its own, whose scripts reach nothing outside of it."""
    return (
        f'<iframe srcdoc="{html.escape(text)}" sandbox="allow-scripts" width="100%" height="{_NOTEBOOK_HEIGHT}" '
        'style="border:0" title="qpass"></iframe>'
    )


def _policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere, and no script runs but the page's own."""
    return f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@cache
def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(_FOLDER)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
