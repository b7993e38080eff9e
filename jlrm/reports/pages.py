"""Pages from templates: one HTML file each, without scripts or network.

Whatever a template prints is escaped, for HTML or for Markdown, because models and users write
hostile text. The style sheet and the colours come from one place (templates/style.css, theme.py);
a number, an interval or a share is worded by the filters here.
"""

from __future__ import annotations

import functools
import html
import pathlib
import re
from typing import Any

from jlrm.judgement.prompts import planting_note
from jlrm.reports import evaluated
from jlrm.reports.charts import picture
from jlrm.reports.theme import DARK, LIGHT
from jlrm.runtime.storage import write_atomically

TEMPLATES = pathlib.Path(__file__).parent / "templates"


def write_page(path: pathlib.Path, template: str, **values: Any) -> None:
    """Fill a template and write it; a value that the template asks for and lacks is an error."""
    text = page(template, **values)
    write_atomically(path, text.encode(errors="replace"))  # lone surrogates become "?"


def page(template: str, **values: Any) -> str:
    """Fill a template."""
    return _environment(template.endswith(".md")).get_template(template).render(values)


def markdown_text(value: Any) -> str:
    """Return one line that Markdown shows as it is."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


@functools.cache
def _environment(is_markdown: bool) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=not is_markdown,
        finalize=markdown_text if is_markdown else None,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "at": evaluated.value_at,
        "count": "{:,}".format,
        "independence": lambda of: evaluated.independence_text(of.n, of.clusters, of.design_effect),
        "name": evaluated.shown_name,
        "number": evaluated.number_text,
        "picture": picture,
        "planting_note": planting_note,
        "policy": evaluated.policy_text,
        "range": evaluated.range_text,
    }
    environment.globals |= {"light": LIGHT, "dark": DARK}
    return environment
