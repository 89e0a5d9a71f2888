"""Renders the HTML templates of a package with the layout that all pages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2


def render_page(
    package: str,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable] | None = None,
    template: str = "report.html.j2",
) -> str:
    """Render a template of a package.

    Args:
        package: dotted name of the package, such as `pipelines.ingest`.
        values: variables of the template; a missing one is an error.
        filters: template filters by name.
        template: name of the file in the package's folder `templates`.

    Returns:
        A self-contained HTML page.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package), jinja2.PackageLoader("pipelines.common")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)
