"""A saved model's report as one page, HTML or Markdown: what was asked, what was reached, and why.

`content` says what is on the page, in terms of `parts`; `html` and `markdown` write these down; `figures` draws.
"""

from fxprune.page.content import Saved, page, read
from fxprune.page.html import html
from fxprune.page.markdown import markdown

__all__ = ["Saved", "html", "markdown", "page", "read"]
