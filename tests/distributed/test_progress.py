"""Progress bars in a terminal, in a log and in a notebook; names that are made printable."""

import io
import os
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from processes import ROOT, run_in_terminal

from music_jax import cli
from music_jax.distributed import progress
from music_jax.distributed.progress import escape_surrogates, printable
from music_jax.errors import UserError

_COUNT = """
import time
from music_jax.distributed import progress
bar = progress.bar(300, unit="img", description="counting")
for i in range(30):
    time.sleep(0.05)
    bar.set_postfix({"loss": f"{i}"}, refresh=False)
    bar.update(10)
    if i == 20:
        progress.say("said in between")
bar.close()
"""


def test_a_bar_in_a_log_is_a_few_complete_lines():
    done = subprocess.run(
        [sys.executable, "-c", _COUNT],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stderr.split("\n")
    assert lines.pop() == ""
    assert 1 <= len(lines) <= 2
    assert "\r" not in done.stderr
    assert "300/300" in lines[-1]
    assert "loss=29" in lines[-1]
    assert done.stdout == "said in between\n"


def test_a_bar_in_a_terminal_is_redrawn_in_place():
    code, drawn = run_in_terminal([sys.executable, "-c", _COUNT], stream="stderr")
    assert code == 0
    assert drawn.count("\r") > 5
    assert drawn.count("\n") == 1
    assert "300/300" in drawn.split("\r")[-2]


def test_values_that_do_not_fit_in_a_terminal_are_left_out_and_not_cut():
    code = """
from music_jax.distributed import progress
bar = progress.bar(100, unit="img", description="pre-training")
bar.set_postfix({"loss": "-4.301", "gap_to_bound": "1.234", "usage_entropy": "0.999"})
bar.close()
"""
    _, drawn = run_in_terminal([sys.executable, "-c", code], stream="stderr", columns=80)
    last = drawn.split("\r")[-2]
    assert last.rstrip().endswith("loss=-4.301]")
    assert len(last) <= 80


def test_the_time_left_excludes_the_compilation_of_the_first_step():
    bar, clock = progress.bar(1000, unit="img", description="training"), [0.0]
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    for seconds in (30, *[2] * 20):
        clock[0] += seconds
        bar.update(10)
    assert bar.format_dict["rate"] == pytest.approx(5)
    bar.close()


# What tqdm uses of ipywidgets, which is not installed for the tests.
_WIDGETS = """
import types

class HTML:
    value = bar_style = ""
    def __init__(self, **fields):
        self.layout = types.SimpleNamespace()
        self.style = types.SimpleNamespace(bar_color=None)
        self.__dict__.update(fields)

FloatProgress = HTML

class HBox(HTML):
    def _repr_mimebundle_(self, **_):
        return {"text/html": "a widget"}
    def shown(self):
        left, bar, right = self.children
        text = f"{left.value}|{bar.value}/{bar.max} {bar.bar_style}|{right.value}"
        return text.replace("\\u2007", " ")
"""
_WITHOUT = "import sys\nsys.modules['ipywidgets'] = None\n"
_WITH = "import sys\ndel sys.modules['ipywidgets']\nsys.path.insert(0, {path!r})\n"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The outputs of a cell in a real kernel, first without ipywidgets and then with them."""
    path = tmp_path_factory.mktemp("widgets")
    (path / "ipywidgets.py").write_text(_WIDGETS)
    cells = (
        _WITHOUT + _COUNT,
        _WITH.format(path=str(path)) + _COUNT + "print(bar.container.shown())",
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(
        book,
        kernel_name="python3",
        startup_timeout=300,
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    return [cell.outputs for cell in book.cells]


def _stream(outputs, name):
    return "".join(output.text for output in outputs if output.get("name") == name)


def test_a_bar_in_a_notebook_without_widgets_goes_to_standard_output(notebook):
    text = _stream(notebook[0], "stdout")
    assert _stream(notebook[0], "stderr") == ""
    assert "300/300" in text
    assert "\rcounting: 100%|" in text
    assert "said in between\n" in text


def test_a_bar_in_a_notebook_is_a_widget(notebook):
    shown = [output.data["text/html"] for output in notebook[1] if "data" in output]
    assert shown == ["a widget"]
    assert _stream(notebook[1], "stderr") == ""
    lines = _stream(notebook[1], "stdout").splitlines()
    assert lines[0] == "said in between"
    assert lines[1].startswith("counting: 100%|300/300 success| 300/300 [")
    assert lines[1].endswith("loss=29]")
    assert len(lines) == 2


def test_a_process_other_than_the_main_one_shows_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_main_process", lambda: False)
    with progress.bar(30, unit="img", description="training") as bar:
        bar.set_postfix({"loss": "1"}, refresh=False)
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_lines_become_less_frequent_in_a_long_run(monkeypatch):
    clock, lines = [0.0], []

    class Log:
        write = staticmethod(lines.append)
        flush = staticmethod(lambda: None)

    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    log = progress._Lines(Log)
    for second in range(0, 36000, 5):
        clock[0] = second
        log.write(f"\r{second} s")
    assert len(lines) < 150
    assert lines[0] == "10 s\n"
    log.write("\n")
    assert lines[-1] == "35995 s\n"
    log.write("\n")
    assert len(lines) == len(set(lines))
    for second in (40000, 40001):  # tqdm draws the end twice, with other times
        clock[0] = second
        log.write(f"\r100% 9/9 [{second} s]")
    log.write("\n")
    assert lines[-1] == "100% 9/9 [40000 s]\n"


_HOSTILE = "a\x1b[2Jb\rc\nd\x9be\u202ef\x07g\udcffh\u2028i"
_SHOWN = r"a\x1b[2Jb\rc\nd\x9be\u202ef\x07g\xffh\u2028i"


@pytest.mark.parametrize(
    "text", ["plain", "größer 大きい 😀", "a\u00a0b\u3000c", "", "100 % of C:\\dir"]
)
def test_text_of_any_language_is_unchanged(text):
    assert printable(text) == text


def test_control_characters_are_escaped():
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


def test_characters_missing_in_the_terminals_encoding_are_escaped(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, "ascii"))
    progress.say("Größe\x1b")
    sys.stdout.flush()
    assert file.getvalue() == b"Gr\\xf6\\xdfe\\x1b\n"


def test_bytes_that_are_not_utf8_are_escaped():
    assert (
        escape_surrogates(os.fsdecode("Straße ".encode() + b"caf\xe9\xff"))
        == "Straße caf\\xe9\\xff"
    )
    assert escape_surrogates("\ud800") == "\\ud800"
