"""A complete training in this process: its files, and stopping, resuming and rewinding it."""

import dataclasses
import functools
import json
import signal
import threading

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils
from tiny_training import tiny_config

from music_jax.data import datasets
from music_jax.data.crops import Crop
from music_jax.data.loader import training_batches
from music_jax.data.order import TrainingOrder
from music_jax.distributed import mesh
from music_jax.distributed.signals import Stop
from music_jax.errors import DivergedError, StoppedError
from music_jax.train import failures, loop, train_and_evaluate

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A workdir, and the state that its training ended with, which ran off the main thread."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    handlers = [signal.getsignal(number) for number in SIGNALS]
    states = []
    thread = threading.Thread(target=lambda: states.append(train_and_evaluate(config, workdir)))
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    return workdir, states[0]


def _json(path):
    return json.loads(path.read_text())


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _metrics(workdir):
    """Returns all logged values except for the speed."""
    lines = _lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def _bytes(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.opt_state))]


def _saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _kinds(workdir):
    return [(line["event"], line["step"]) for line in _lines(workdir / "events.jsonl")]


def test_a_training_off_the_main_thread_leaves_all_files(finished, config):
    workdir, state = finished
    assert int(state.step) == 6
    assert _saved_steps(workdir) == [4, 6]
    assert _json(workdir / "config.json")["config"]["batch_size"] == 32
    logged = _metrics(workdir)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([line["epoch"] for line in logged], np.arange(1, 7) / 3)
    # 0.6 * 32 / 256, reached after an epoch; then half a cosine to a thousandth of it.
    peak, cosine = 0.075, (1 + np.cos(np.pi * np.arange(3) / 3)) / 2
    expected = [0, peak / 3, 2 * peak / 3, *peak * (0.999 * cosine + 0.001)]
    rates = [line["learning_rate"] for line in logged]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-12)
    for line in logged:
        total = line["diagonal"] + line["cross_segment"] + line["invariance"]
        np.testing.assert_allclose(line["loss"], total, rtol=1e-6)
        np.testing.assert_allclose(line["gap_to_bound"], total + 3 * np.log(4), rtol=1e-5)
    for name in ("linear_eval", "knn"):
        found = _json(workdir / f"{name}.json")
        assert (found["num_train"], found["num_test"], found["step"]) == (100, 60, 6)
        assert found["top1"] * 60 == pytest.approx(round(found["top1"] * 60))
        assert found["top1"] > 0.3  # ten classes


def test_a_finished_run_trains_nothing_and_returns_its_state(finished, config, monkeypatch, capsys):
    workdir, state = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.json*")}
    monkeypatch.setattr(loop, "compile_step", None)
    again = train_and_evaluate(config, workdir)
    assert _bytes(again) == _bytes(state)
    assert f"{workdir} is done: 6 steps trained and evaluated" in capsys.readouterr().out
    before.pop(workdir / "config.json")  # written by each start
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


class _At(Stop):
    """Does something after a number of steps."""

    def __init__(self, steps, action):
        self._left, self._action = steps, action

    def begin(self):
        self._left -= 1
        if self._left == 0:
            self._action(self)


def _interrupt(stop):
    raise KeyboardInterrupt


def _ask(stop):
    stop.received = True


def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(finished, config, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):  # what Ctrl-C is in a notebook
        train_and_evaluate(config, workdir, stop=_At(3, _interrupt))
    assert _saved_steps(workdir) == [2]
    with pytest.raises(StoppedError, match="saved at step 3 of 6; rerun the command"):
        train_and_evaluate(config, workdir, stop=_At(1, _ask))
    assert _saved_steps(workdir) == [2, 3]
    state = train_and_evaluate(config, workdir)
    assert _bytes(state) == _bytes(finished[1])
    assert _metrics(workdir) == _metrics(finished[0])
    assert _kinds(workdir) == [("resumed", 2), ("resumed", 3)]
    for name in ("linear_eval.json", "knn.json"):
        assert _json(workdir / name) == _json(finished[0] / name)


def test_online_measures_change_no_bit_and_resume(finished, config, tmp_path, capsys):
    config = config.copy_and_resolve_references()
    config.log_every_steps = 5
    config.online.update({"every_steps": 3, "measures": ("knn", "rankme", "lidar")})
    config.online.update({"num_images": 80, "view_images": 16, "num_views": 2})
    logged = []
    for action in (None, _interrupt):
        workdir = tmp_path / str(action)
        if action:
            with pytest.raises(KeyboardInterrupt):
                train_and_evaluate(config, workdir, stop=_At(4, action))
        state = train_and_evaluate(config, workdir)
        assert _bytes(state) == _bytes(finished[1])
        jax.tree.map(np.testing.assert_array_equal, state.batch_stats, finished[1].batch_stats)
        lines = {line["step"]: line for line in _metrics(workdir)}
        online = {
            step: {x: line[x] for x in line if x.startswith("online_")}
            for step, line in lines.items()
            if "online_knn" in line
        }
        assert list(online) == [0, 3, 6]
        names = {"online_knn", "online_rankme", "online_lidar"}
        for line in online.values():
            assert line.pop("online_seconds") > 0
            assert line.keys() == names
        logged.append(online)
        plain = [{x: y for x, y in lines[i].items() if "online" not in x} for i in (1, 3, 4, 6)]
        assert plain == [_metrics(finished[0])[i - 1] for i in (1, 3, 4, 6)]
    assert logged[0] == logged[1]
    assert logged[0][0] != logged[0][3] != logged[0][6]
    assert lines[0].keys() == {"step", "epoch", "online_seconds", *names}
    assert capsys.readouterr().err.count("online_knn=") > 2


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"objective": {"center": True}}, marks=pytest.mark.slow),
        pytest.param({"objective": {"name": "sigreg", "num_slices": 16}}, marks=pytest.mark.slow),
        pytest.param({"local_views": {"count": 2, "size": 6}}, marks=pytest.mark.slow),
    ],
)
def test_running_means_random_objectives_and_local_views_resume_with_the_same_bits(
    fields, config, tmp_path
):
    config = config.copy_and_resolve_references()
    config.update(fields)
    config.guards.loss_spike_deviations = 0.0  # the first losses of SIGReg rise
    expected = train_and_evaluate(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path / "resumed", stop=_At(3, _interrupt))
    found = train_and_evaluate(config, tmp_path / "resumed")
    assert _bytes(found) == _bytes(expected)
    jax.tree.map(np.testing.assert_array_equal, found.batch_stats, expected.batch_stats)
    if config.objective.center:
        assert np.abs(found.batch_stats["projector"]["center"]["mean"]).max() > 1e-3


@pytest.fixture
def broken_fourth_step(monkeypatch):
    """The parameters are no numbers when the fourth step is taken."""
    compile_step = loop.compile_step

    def compiled(*arguments):
        step_function = compile_step(*arguments)

        def step(state, *batch):
            if int(state.step) == 3:
                params = jax.tree.map(lambda x: x * np.float32(np.nan), state.params)
                state = dataclasses.replace(state, params=params)
            return step_function(state, *batch)

        return step

    monkeypatch.setattr(loop, "compile_step", compiled)


@pytest.mark.usefixtures("broken_fourth_step")
def test_a_bad_step_stops_the_run_and_its_batch_is_saved(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.local_views.update({"count": 2, "size": 6})
    with pytest.raises(
        DivergedError, match=r"not finite at step 4;.*step 2 is saved; its batch is"
    ):
        train_and_evaluate(config, tmp_path)
    assert _saved_steps(tmp_path) == [2]
    assert _kinds(tmp_path) == [("tripped", 4), ("stopped", 4)]
    assert [line["step"] for line in _metrics(tmp_path)] == [1, 2, 3]
    kept = np.load(tmp_path / "divergence" / "step-4.npz")
    order = TrainingOrder(100, 32, 0)
    read = training_batches(
        datasets.training_source(config),
        order,
        views={"images": (Crop(8, (0.5, 1.0)), 2), "local_images": (Crop(6, (0.05, 0.3)), 2)},
        channels=1,
        positions=np.arange(32),
        start_step=3,
        num_steps=4,
    )
    batch = next(read)
    for name in ("images", "local_images"):
        np.testing.assert_array_equal(kept[name], batch[name])
    assert kept["sample_index"].tolist() == list(range(100, 132))  # the second epoch's first
    assert kept["record"].tolist() == [order.record_key(i) for i in range(100, 132)]
    assert (int(kept["step"]), int(kept["seed"])) == (4, 0)
    assert np.isnan(kept["loss"])


@pytest.mark.usefixtures("broken_fourth_step")
def test_a_bad_step_is_skipped_after_a_rewind(config, tmp_path, capsys):
    config = config.copy_and_resolve_references()
    config.guards.policy = "rewind"
    state = train_and_evaluate(config, tmp_path)
    assert int(state.step) == 6
    what = "the loss or the gradient was not finite"
    rewinds = [{"step": 4, "what": what, "skipped": [4]}]
    assert _json(tmp_path / "rewinds.json") == {"rewinds": rewinds}
    assert [line["step"] for line in _metrics(tmp_path)] == [1, 2, 3, 5, 6]
    events = [("tripped", 4), ("rewound", 4), ("resumed", 2), ("skipped", 4)]
    assert _kinds(tmp_path) == events
    (rewound,) = [e for e in _lines(tmp_path / "events.jsonl") if e["event"] == "rewound"]
    assert (rewound["to_step"], rewound["skipped"]) == (2, [4])
    said = capsys.readouterr().out
    assert "rewinding to step 2 (rewind 1 of at most 3), skipping step 4" in said


@pytest.mark.usefixtures("broken_fourth_step")
def test_rewinds_are_counted_over_all_starts_of_a_run(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.guards.update({"policy": "rewind", "max_rewinds": 1})
    earlier = {"rewinds": [{"step": 2, "what": "a leap", "skipped": [1, 2]}]}
    (tmp_path / "rewinds.json").write_text(json.dumps(earlier))
    with pytest.raises(DivergedError, match=r"guards\.max_rewinds = 1 is reached"):
        train_and_evaluate(config, tmp_path)
    assert _json(tmp_path / "rewinds.json") == earlier
    assert [line["step"] for line in _metrics(tmp_path)] == [3]
    assert _kinds(tmp_path)[:2] == [("skipped", 1), ("skipped", 2)]


class _Processes:
    """Two processes that alternate: the other one receives the values of the main one."""

    def __init__(self, monkeypatch):
        self._monkeypatch, self._told = monkeypatch, []
        monkeypatch.setattr(jax, "process_count", lambda: 2)

    def _tell(self, value):
        self._told.append(np.array(value))
        return value

    def main(self, action):
        self._monkeypatch.setattr(jax, "process_index", lambda: 0)
        self._monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", self._tell)
        return action()

    def other(self, action):
        self._monkeypatch.setattr(jax, "process_index", lambda: 1)
        hear = lambda value: self._told.pop(0)  # noqa: E731
        self._monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", hear)
        return action()


@pytest.mark.parametrize("value", [None, 3, "é", {"a": [1.5, None]}, []])
def test_all_processes_get_the_value_of_the_main_one(monkeypatch, value):
    assert mesh.from_main_process(lambda: value) == value
    processes = _Processes(monkeypatch)
    assert processes.main(lambda: mesh.from_main_process(lambda: value)) == value
    unread = functools.partial(pytest.fail, "only the main process reads")
    assert processes.other(lambda: mesh.from_main_process(unread)) == value


def test_the_main_process_alone_reads_the_skipped_steps(config, tmp_path, monkeypatch):
    def read():
        return failures.Recovery(config, epath.Path(tmp_path), None, None).skipped

    processes = _Processes(monkeypatch)
    rewinds = {"rewinds": [{"step": 2, "what": "a leap", "skipped": [1, 2]}]}
    (tmp_path / "rewinds.json").write_text(json.dumps(rewinds))
    assert processes.main(read) == {1, 2}
    (tmp_path / "rewinds.json").unlink()  # as a network file system may show it to the other
    assert processes.other(read) == {1, 2}
