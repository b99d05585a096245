"""Text that may come from anywhere, such as the name of a file, made fit to print."""

import unicodedata


def printable(text: str) -> str:
    r"""Escapes all that a terminal would obey instead of showing it.

    Control and format characters, ends of lines and lone surrogates become, for example, `\x1b`,
    `\n` and `\udcff`, so that the text stays on one line and moves no cursor.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
