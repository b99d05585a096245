"""Text that may come from anywhere, such as the name of a file, made fit to print."""

import unicodedata

from music_jax.workdir.paths import escape_surrogates


def printable(text: str) -> str:
    r"""Escapes all that a terminal would obey instead of showing it.

    Control and format characters and ends of lines become, for example, `\x1b` and `\n`, so that
    the text stays on one line and moves no cursor; for surrogates see `paths.escape_surrogates`.
    """
    text = escape_surrogates(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
