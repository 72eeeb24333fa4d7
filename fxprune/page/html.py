"""The page as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.page.parts import Page


def html(page: Page) -> str:
    """Return the page as HTML.

    >>> from fxprune.page.parts import Section, Text
    >>> text = html(Page("A <model>", "Half of it.", [Section("result", "Result", [Text("Good.")], "result")]))
    >>> "A &lt;model&gt;" in text, "<p>Good.</p>" in text, 'href="#result"' in text
    (True, True, True)
    """
    environment = Environment(
        loader=PackageLoader("fxprune.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["a"] = lambda value, kind: type(value).__name__ == kind
    return environment.get_template("page.html.jinja").render(page=page)
