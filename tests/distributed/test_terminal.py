"""What reaches a terminal of names that come from anywhere."""

import io
import sys

import pytest

from music_jax import cli
from music_jax.distributed import progress
from music_jax.distributed.terminal import printable
from music_jax.errors import UserError

_HOSTILE = "a\x1b[2Jb\rc\nd\x9be\u202ef\x07g\udcffh\u2028i"
_SHOWN = r"a\x1b[2Jb\rc\nd\x9be\u202ef\x07g\xffh\u2028i"


@pytest.mark.parametrize(
    "text", ["plain", "größer 大きい 😀", "a\u00a0b\u3000c", "", "100 % of C:\\dir"]
)
def test_text_of_any_language_stays_as_it_is(text):
    assert printable(text) == text


def test_what_a_terminal_would_obey_is_escaped():
    assert printable(_HOSTILE) == _SHOWN
    every = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x061C, *range(0x202A, 0x202F))))
    assert printable(every).isascii()
    assert printable(every).isprintable()


def test_names_are_escaped_in_lines_tables_bars_and_errors(capsys):
    progress.say(f"skipped {_HOSTILE}")
    table = progress.table(("file", "x"), [(_HOSTILE, "1"), ("b", "2")])
    assert len(table.split("\n")) == 4
    progress.say_lines(table)
    with progress.bar(1, unit="img", description=_HOSTILE) as bar:
        bar.update(1)
    with pytest.raises(SystemExit) as end:
        cli.fail(UserError(f"no such file {_HOSTILE}"))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"skipped {_SHOWN}"
    assert len(out.splitlines()) == 5
    assert err.splitlines()[-1] == f"error: no such file {_SHOWN}"
    assert err.count(_SHOWN) == 2
    for stream in (out, err):
        assert all(c.isprintable() or c in "\n" for c in stream)


def test_a_terminal_of_another_encoding_shows_what_it_has_not_escaped(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, "ascii"))
    progress.say("Größe\x1b")
    sys.stdout.flush()
    assert file.getvalue() == b"Gr\\xf6\\xdfe\\x1b\n"
