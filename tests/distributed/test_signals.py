"""Real signals to a real process, at each stage of a command."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
COMMAND = """
import atexit, hashlib, os, sys, time
from music_jax.errors import StoppedError
from music_jax.distributed.signals import StopSignal, end_on_signal, ignore_signals

def end():
    sys.stderr.write("ended\\n")
    os._exit(75)

def be_busy():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # busy elsewhere, as in a compilation

end_on_signal(end)
stage, seconds = sys.argv[1], float(sys.argv[2])
stop = StopSignal(alone=True, grace_seconds=seconds)
try:
    with stop:
        if stage == "before":
            be_busy()
        stop.begin()
        if stage == "busy":
            be_busy()
        if stage in ("training", "hangs", "leaving"):
            print("ready", flush=True)
            while not stop.received:
                time.sleep(0.01)
            print("saving", flush=True)
        if stage == "hangs":
            time.sleep(60)
        if stage == "training":
            raise StoppedError("saved")
    if stage == "after":
        be_busy()
    if stage == "done":
        ignore_signals()
        atexit.register(time.sleep, 1)
        print("ready", flush=True)
except StoppedError as error:
    print(error, flush=True)
    if stage == "leaving":
        time.sleep(1)
    sys.exit(75)
"""


def start(stage, grace=60.0):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, stage, str(grace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_stops_and_saves(number):
    process = start("training")
    process.send_signal(number)
    code, out, err = end(process)
    assert (code, out) == (75, "saving\nsaved\n")
    assert "stopping after this step" in err


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_even_code_outside_python(number):
    process = start("before")
    time.sleep(0.2)
    process.send_signal(number)
    assert end(process) == (75, "", "ended\n")


@pytest.mark.parametrize("stage", ["before", "training"])
def test_a_closed_terminal_stops_the_run_and_saves(stage, tmp_path):
    """The process's own terminal hangs up, and printing to it is an error from then on."""
    command = COMMAND.replace('print("saving", flush=True)', 'print("lost"); saved()')
    begin = f"""
import fcntl, termios
def saved(): open({str(tmp_path / "saved")!r}, "w").close()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
"""
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", begin + command, stage, "60"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    time.sleep(0.2)
    os.close(terminal)
    try:
        assert process.wait(timeout=20) == 75
    finally:
        process.kill()
    assert (tmp_path / "saved").exists() == (stage == "training")


def test_the_two_signals_of_a_closed_terminal_count_once():
    """The shell and the kernel each send the signal."""
    with start("leaving") as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGHUP)
        out = process.stdout.read()  # communicate would lose what readline has read ahead
    assert (process.returncode, out) == (
        75,
        "saved at the last step; rerun the command to finish\n",
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_between_the_stop_and_the_exit_do_not_change_the_exit_code(number):
    process = start("leaving")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    assert process.stdout.readline().startswith("saved at the last step")
    process.send_signal(number)
    assert end(process) == (
        75,
        "",
        "\nstopping after this step; send the signal again to stop at once\n",
    )


def test_a_closed_terminal_is_ignored_under_nohup():
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", COMMAND, "training", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    code, out, _ = end(process)
    assert (code, out) == (75, "saving\nsaved\n")


def test_after_the_steps_a_signal_ends_at_once():
    process = start("after")
    time.sleep(0.2)
    process.terminate()
    assert end(process) == (75, "", "ended\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_end_is_ignored(number):
    process = start("done")
    time.sleep(0.2)
    process.send_signal(number)
    assert end(process) == (0, "", "")


def test_a_signal_too_late_for_the_loop_still_stops():
    process = start("leaving", grace=5.0)
    process.terminate()
    code, out, _ = end(process)
    assert code == 75
    assert out == "saving\nsaved at the last step; rerun the command to finish\n"


def test_a_second_signal_ends_code_outside_python():
    process = start("busy")
    process.terminate()
    assert [process.stderr.readline() for _ in range(2)][1].startswith("stopping after this step")
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 128 + signal.SIGUSR1


def test_the_grace_period_ends_code_outside_python():
    process = start("busy", grace=0.5)
    process.terminate()
    assert end(process)[0] == 75


def test_any_second_signal_ends_at_once():
    process = start("hangs")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (128 + signal.SIGINT, "")
    assert "what was saved before is intact" in err


def test_a_run_that_cannot_be_saved_ends_after_its_grace_period():
    process = start("hangs", grace=2.5)
    process.terminate()
    code, out, err = end(process)
    assert (code, out) == (75, "saving\n")
    assert "not saved within checkpoint.grace_seconds = 2.5" in err
