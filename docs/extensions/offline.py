"""Warns about pages that load remote resources, so that all pages can be opened from disk."""

import pathlib
import re

from sphinx.util import logging

_logger = logging.getLogger(__name__)
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"'](?:https?:)?//[^\"']*"
    r"|<link[^>]*rel=[\"'](?:stylesheet|preload|preconnect)[\"'][^>]*href=[\"'](?:https?:)?//[^\"']*"
)
_IMPORTED = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]*")


def _check_pages(app, exception) -> None:
    if exception is not None or app.builder.format != "html":
        return
    for pattern, glob in ((_FETCHED, "*.html"), (_IMPORTED, "*.css")):
        for path in sorted(pathlib.Path(app.outdir).rglob(glob)):
            for found in pattern.findall(path.read_text(encoding="utf-8")):
                _logger.warning("%s fetches %s", path.name, found)


def setup(app):
    app.connect("build-finished", _check_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
