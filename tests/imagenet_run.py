"""`configs/imagenet.py` from the tars to the probe, on a few images: every real component once.

    python tests/imagenet_run.py

writes tars of ImageNet's layout with 80 photos in a temporary folder, has `music_jax.main` prepare
TFDS's imagenet2012 from them (TensorFlow is needed) and train for 20 steps of 16 images at the
recipe's full size: 1,000 classes, 224 pixels, ResNet-50 in bfloat16, projector 8192-8160, LARS.
It is stopped by a signal on the way and goes on from its checkpoint, and is probed at the end. It
prints the time and the largest memory of a process.
"""

import json
import os
import pathlib
import resource
import signal
import tempfile
import time

from imagenet_tars import write_photos
from processes import ROOT, metrics, run, start

NUM_TRAIN, NUM_VALIDATION, BATCH, NUM_EPOCHS = 80, 20, 16, 4
NUM_STEPS = NUM_TRAIN // BATCH * NUM_EPOCHS
_MAIN = "music_jax.main"


def train(folder: pathlib.Path, *more: str, stop_at: int = 6, timeout: float = 3600) -> dict:
    """Prepares, trains, stops at a step, resumes and probes.

    Args:
      folder: an empty one, for the tars, the dataset and the workdir `run`.
      more: further arguments of `music_jax.main`.
      stop_at: the signal is sent once this step is logged.
      timeout: for each of the two commands, in seconds.

    Returns:
      What was seen: the step at which it stopped, the last output and linear_eval.json.
    """
    write_photos(folder / "manual", NUM_TRAIN, NUM_VALIDATION)
    arguments = (
        f"--config={ROOT / 'configs' / 'imagenet.py'}",
        f"--workdir={folder / 'run'}",
        f"--config.dataset.data_dir={folder / 'data'}",
        f"--config.dataset.manual_dir={folder / 'manual'}",
        f"--config.batch_size={BATCH}",
        f"--config.num_epochs={NUM_EPOCHS}",
        "--config.optimizer.warmup_epochs=1",
        "--config.log_every_steps=1",
        "--config.checkpoint.every_steps=15",
        "--config.linear_eval.num_epochs=1",
        "--config.linear_eval.batch_size=16",
        *more,
    )
    process = start(_MAIN, *arguments)
    try:
        log = folder / "run" / "metrics.jsonl"
        deadline = time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= stop_at:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.1)
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    if process.returncode != 75:
        raise RuntimeError(f"exit code {process.returncode}, not 75:\n{err}")
    stopped = metrics(folder / "run")[-1]["step"]
    code, out, err = run(_MAIN, *arguments, timeout=timeout)
    if code != 0:
        raise RuntimeError(f"exit code {code}, not 0:\n{err}")
    results = json.loads((folder / "run" / "linear_eval.json").read_text())
    return {"stopped": stopped, "output": out, "linear_eval": results}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        seen = train(pathlib.Path(folder))
        minutes = (time.monotonic() - started) / 60
        losses = [round(line["loss"], 3) for line in metrics(pathlib.Path(folder, "run"))]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(seen["output"])
    print(f"{NUM_STEPS} steps, stopped after {seen['stopped']}: losses {losses}")
    print(f"{minutes:.1f} minutes on {len(os.sched_getaffinity(0))} cores, {memory:.1f} GiB")


if __name__ == "__main__":
    main()
