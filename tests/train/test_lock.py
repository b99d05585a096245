"""Two real processes that want one workdir."""

import signal
import subprocess
import sys

import pytest
from etils import epath

from music_jax.errors import UserError
from music_jax.train.lock import WorkdirLock

HOLD = """
import sys, time
from etils import epath
from music_jax.train.lock import WorkdirLock
with WorkdirLock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_is_refused_by_name_until_the_first_is_killed(tmp_path, holder):
    with pytest.raises(UserError, match=rf"process {holder.pid} on \S+, since 2"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with WorkdirLock(epath.Path(tmp_path)):
        pass


def test_lock_is_free_after_leaving_and_after_garbage(tmp_path):
    with WorkdirLock(epath.Path(tmp_path)):
        pass
    (tmp_path / "lock").write_bytes(b"\xff garbage")
    with WorkdirLock(epath.Path(tmp_path)):
        pass
