"""Progress bars in a terminal, in a log and below a notebook's cell."""

import os
import pty
import subprocess
import sys

from processes import ROOT

_COUNT = """
import sys, time
from music_jax.distributed import progress
if {notebook}:
    import types
    class Shell:
        config = {{"IPKernelApp": 1}}
    sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: Shell)
bar = progress.bar(300, unit="img", description="counting")
for i in range(30):
    time.sleep(0.05)
    bar.set_postfix({{"loss": f"{{i}}"}}, refresh=False)
    bar.update(10)
    if i == 20:
        progress.say("said in between")
bar.close()
"""


def _count(stderr, *, notebook=False):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", _COUNT.format(notebook=notebook)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=120,
        check=True,
    )


def test_in_a_log_it_is_a_few_whole_lines_and_the_last_says_that_all_is_done():
    done = _count(subprocess.PIPE)
    lines = done.stderr.decode().split("\n")
    assert lines.pop() == ""
    assert 1 <= len(lines) <= 2
    assert "\r" not in done.stderr.decode()
    assert "300/300" in lines[-1]
    assert "loss=29" in lines[-1]
    assert done.stdout.decode() == "said in between\n"


def test_in_a_terminal_it_is_drawn_in_one_place():
    ours, theirs = pty.openpty()
    _count(theirs)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that this is all
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    assert drawn.count(b"\r") > 5
    assert drawn.count(b"\n") == 1
    assert b"300/300" in drawn.split(b"\r")[-2]


def test_below_a_notebooks_cell_it_goes_with_the_text():
    done = _count(subprocess.PIPE, notebook=True)
    assert done.stderr == b""
    text = done.stdout.decode()
    assert "\r" in text
    assert "300/300" in text
    assert "said in between\n" in text


def test_lines_become_rarer_in_a_long_run(monkeypatch):
    from music_jax.distributed import progress

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
