"""A whole run directory of another user, as a target of `fuzz.py`."""

import functools
import json
import os
import pathlib
import random
import shutil
import tempfile
from unittest import mock

import cv2
import numpy as np
from hostile_json import hostile_json, hostile_value
from small_runs import save_run, small_config

from music_jax import load
from music_jax.data.folder import open_folder
from music_jax.evaluate import evaluate
from music_jax.exchange.folder_encoding import encode_folder
from music_jax.export import export
from music_jax.report.page import write_report
from music_jax.workdir.run_config import DATA_FIELDS, sign

_LINKED = (
    *("report.html", "report.html.new", "knn.json", "linear_eval.json", "linear_eval.npz"),
    *("skipped.jsonl", "metrics.jsonl", "events.jsonl", "features", "compilation_cache", "lock"),
    *("backbone", "backbone.md", ".backbone.new", "out.npy", "out.npy.json", "out.npy.parts"),
)
_TARGETS = ("../outside/secret.png", "../outside/new", "../outside")


@functools.cache
def _made() -> tuple[pathlib.Path, pathlib.Path]:
    """A run that another user saved, and images of this one."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    photos = directory / "photos"
    for i in range(4):
        path = photos / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((28, 28), 60 * i, np.uint8))
    config = small_config()
    config.dataset.update({"name": "digits", "data_dir": "../outside"})
    with mock.patch.dict(os.environ, XDG_STATE_HOME=str(directory / "another")):
        save_run(directory / "run", config)
    lines = [json.dumps({"step": i, "epoch": i / 2, "loss": 1.5}) for i in range(1, 4)]
    (directory / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with mock.patch.dict(os.environ, XDG_STATE_HOME=str(directory / "state")):
        sign(config)
    return directory / "run", photos


def foreign_run(rng: random.Random, directory: pathlib.Path) -> None:
    """Opens it by one of the commands, which may write nothing but what it was told to."""
    made, photos = _made()
    with mock.patch.dict(os.environ, XDG_STATE_HOME=str(made.parent / "state")):
        _open(rng, directory, made, photos)


def _open(
    rng: random.Random, directory: pathlib.Path, made: pathlib.Path, photos: pathlib.Path
) -> None:
    run = directory / "run"
    shutil.copytree(made, run)
    record = json.loads((run / "config.json").read_text())
    for _ in range(rng.randrange(3)):
        field = rng.choice(DATA_FIELDS)
        part, name = field.split(".")
        record["config"][part][name] = rng.choice(
            (
                "../outside",
                "../outside/new",
                str(photos),
                "huggingface:x",
                "x:y",
                hostile_value(rng),
            )
        )
    text = hostile_json(rng, record) if rng.random() < 0.3 else json.dumps(record).encode()
    (run / "config.json").write_bytes(text)
    for name in rng.sample(_LINKED, rng.randrange(5)):
        if not (run / name).exists() or (run / name).is_file():
            (run / name).unlink(missing_ok=True)
            target = os.path.normpath(directory / rng.choice(_TARGETS))
            (run / name).symlink_to(target)
    given = {"evaluation.train": str(photos), "evaluation.test": str(photos)}
    given |= {"knn.k": 1, "knn.more_k": ()}
    overrides = given if rng.random() < 0.5 else None
    command = rng.choice(("report", "evaluate", "evaluate", "export", "load", "encode"))
    if command == "report":
        write_report([str(run)], num_images=16, overrides=overrides)
    elif command == "evaluate":
        elsewhere = rng.choice((None, str(directory / "out")))
        evaluate(str(run), protocols=("knn",), output=elsewhere, overrides=overrides)
    elif command == "export":
        export(str(run), form="safetensors", output=str(run / "backbone"))
    else:
        encoder = load(str(run))
        if command == "encode":
            encode_folder(encoder, open_folder(str(photos)), str(run / "out.npy"))
