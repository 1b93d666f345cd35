"""What went wrong, for a `gr.Markdown`: the names and paths in a sentence are text, not HTML or Markdown."""

import html
import re


def warning(sentence: object) -> str:
    """The sentence of an error as Markdown that shows every character of it."""
    return "⚠️ " + re.sub(r"([\\`*_\[\]~])", r"\\\1", html.escape(str(sentence), quote=False))
