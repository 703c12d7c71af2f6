"""Jinja environments for the templates of this package.

Both escape every expression. In HTML that is Jinja's autoescape. In Markdown `finalize` escapes whatever would be markup;
only values of type `Markup`, such as the output of the filter `fence`, are inserted as they are.
"""

import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nextword.common.format import format_bytes, format_count, format_duration
from nextword.reporting import formatting as fmt
from nextword.reporting.run_data import is_number, short_path_name

TEXT_FILTERS: tuple[Callable[..., str], ...] = (
    fmt.fence,
    fmt.interval,
    fmt.number,
    fmt.perplexity,
    fmt.readable,
    fmt.score,
)
RESULT_FILTERS: tuple[Callable[..., Any], ...] = (fmt.extreme_groups, fmt.item_count, fmt.provenance, fmt.versus_chance)


def render_html(template: str, **context: Any) -> str:
    """Render an HTML template; every value is escaped."""
    return fmt.sanitize(_environment(markdown=False).get_template(template).render(context))


def render_markdown(template: str, **context: Any) -> str:
    """Render a Markdown template; every value is escaped."""
    return fmt.sanitize(_environment(markdown=True).get_template(template).render(context))


def read_resource(name: str) -> str:
    """The text of a file beside the templates, unrendered."""
    return (resources.files("nextword.reporting") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment(markdown: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("nextword.reporting"),
        autoescape=True,
        finalize=fmt.escape_markdown if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    for function in (*TEXT_FILTERS, *RESULT_FILTERS):
        environment.filters[function.__name__] = function
    environment.filters.update(bytes=format_bytes, count=format_count, duration=format_duration)
    environment.filters.update(json=lambda value: Markup(json.dumps(value)), short_name=short_path_name)
    environment.tests["finite"] = is_number
    return environment
