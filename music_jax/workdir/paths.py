"""Names of files and folders: as they are compared, and as they are written."""

import os
import re

from music_jax.errors import UserError

_SURROGATES = re.compile("[\ud800-\udfff]")


def normalized(path: str) -> str:
    """Returns one name for all spellings of a folder: `~` expanded, no `./`, `//` or final `/`.

    Links are not resolved, a relative path stays relative, and the name of a TFDS split or the
    address of a bucket stays as it is.
    """
    if not path or "://" in path:
        return path
    return os.path.normpath(os.path.expanduser(path))


def escape_surrogates(text: str) -> str:
    r"""Returns text that any file, report and terminal can hold, such as a file's name.

    Bytes of a name that are not UTF-8, which Python reads as surrogates, become `\xe9`.
    """
    return _SURROGATES.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def check_utf8(path: str) -> None:
    """Checks that a library that writes files in C++ can be given a path.

    Raises:
      UserError: the path is not UTF-8.
    """
    if escape_surrogates(path) != path:
        raise UserError(
            f"the name of {escape_surrogates(path)} is not UTF-8, which Orbax and array_record "
            "need; rename it, or give another directory"
        )
