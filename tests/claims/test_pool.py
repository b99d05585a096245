"""The worker processes of a sweep."""

import os
import types

import threadpoolctl
from etils import epath

from music_jax.claims import pool


def test_a_worker_uses_only_its_core_from_the_start(tmp_path):
    before = os.sched_getaffinity(0)
    core = max(before)
    sweep = types.SimpleNamespace(directory=epath.Path(tmp_path))
    with pool._start_worker(sweep, 0, core) as worker:
        assert worker.submit(os.sched_getaffinity, 0).result() == {core}
        libraries = worker.submit(threadpoolctl.threadpool_info).result()
    assert {library["num_threads"] for library in libraries} == {1}
    assert os.sched_getaffinity(0) == before
    assert (tmp_path / "worker-0.log").exists()
