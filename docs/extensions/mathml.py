"""Converts formulas to MathML, which browsers render without scripts, fonts or the network."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

# Browsers put no space between a function and its argument, or what precedes it.
_BEFORE_FUNCTION = re.compile(r"(?<=[\w)}])\s+(?=\\(?:log|exp|max)\b)")
_FUNCTION = re.compile(r"\\(log|exp|max)\s+")
_logger = logging.getLogger(__name__)


def _convert(node, *, block: bool) -> str:
    tex = _BEFORE_FUNCTION.sub(r"\\,", node.astext().strip())
    tex = _FUNCTION.sub(r"\\\1\\,", tex)
    if block and "\\\\" in tex and "\\begin" not in tex:
        tex = "\\begin{aligned}" + tex + "\\end{aligned}"
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        _logger.warning("cannot convert the formula %r: %s", tex, error, location=node)
        return f"<code>{tex}</code>"


def _visit_inline(translator, node) -> None:
    translator.body.append(_convert(node, block=False))
    raise nodes.SkipNode


def _visit_block(translator, node) -> None:
    translator.body.append(f'<div class="math">{_convert(node, block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
