"""Templates made into pages: one file each, that needs nothing else.

Called by `plumbline.report.page` and `plumbline.report.compare`. The one script is named by its digest in the page's
policy, so that no browser runs another, and nothing is fetched from elsewhere.
"""

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from plumbline.errors import UserError

HERE = Path(__file__).parent


def render_page(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of `values`."""
    pages = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(HERE, encoding="utf-8"),
    )
    pages.filters["code"] = _code
    script = (HERE / "page.js").read_text("utf-8")
    return pages.get_template(template).render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((HERE / "page.css").read_text("utf-8")),
        **values,
    )


def write_page(path: Path, page: str) -> Path:
    """Write a page, whole or not at all; returns its path. Raises UserError: it cannot be written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold halves of surrogate pairs
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make {path.parent} writable") from None
    finally:
        aside.unlink(missing_ok=True)
    return path


def _code(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(text.split("`"))
    )
