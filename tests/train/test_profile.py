"""Steps that can be profiled, and the messages for those that cannot."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from music_jax.errors import UserError
from music_jax.train.profile import Profile, parse_steps


@pytest.mark.parametrize(
    "text", ["", "5", "5:", ":5", "5:4", "0:3", "-1:3", "a:b", "1:2:3", "1.5:2"]
)
def test_a_malformed_range_is_refused(text):
    with pytest.raises(UserError, match=r"--profile=.* must be START:STOP"):
        parse_steps(text)


def test_range_beyond_the_training_is_refused():
    assert parse_steps("20:24") == (20, 24)
    with pytest.raises(UserError, match=r"cannot profile steps 20 to 24.* steps 1 to 23"):
        Profile(epath.Path("x"), (20, 24), num_steps=23)


def test_steps_that_were_taken_before_are_not_profiled(tmp_path, capsys):
    profile = Profile(epath.Path(tmp_path), (3, 4), num_steps=9)
    for step in range(5, 10):
        profile.before(step, jnp.zeros(()))
        profile.after(step, jnp.zeros(()))
    profile.close()
    assert (
        "not profiled: the training resumes after step 4, and steps 3 to 4 were taken before"
        in capsys.readouterr().out
    )
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_ends_early_keeps_its_profile(tmp_path):
    # Its own process: XLA's profiler and those of libraries that other tests load share one.
    code = """
import sys
import jax.numpy as jnp
from etils import epath
from music_jax.distributed.progress import log_to_stdout
from music_jax.train.profile import Profile

log_to_stdout()
profile = Profile(epath.Path(sys.argv[1]), (2, 9), num_steps=9)
for step in (1, 2, 3):
    profile.before(step, jnp.zeros(()))
    profile.after(step, jnp.ones(3) * step)
profile.close()
profile.close()
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert said.count("saved the profile in ") == 1
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_the_first_and_the_last_step_are_recorded(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    profile = Profile(epath.Path(tmp_path), (2, 4), num_steps=9)
    for step in range(1, 7):
        profile.before(step, jnp.zeros(()))
        seen.append(step)
        profile.after(step, jnp.zeros(()))
    profile.close()
    assert seen == [1, "start", 2, 3, 4, "stop", 5, 6]
