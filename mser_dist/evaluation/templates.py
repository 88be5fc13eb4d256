"""Pages of HTML from the templates beside this file; whatever is filled in is escaped."""

from pathlib import Path
from typing import Any


def render(template: str, **what: Any) -> str:
    """The text of a page."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(**what) + "\n"
