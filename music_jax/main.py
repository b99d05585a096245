r"""Pre-trains a backbone, then evaluates it.

To resume a stopped run, rerun the command with the same arguments. If the run is finished, the
command reports this and trains nothing.

  python -m music_jax.main --config=mnist5k --workdir=runs/mnist5k
  python -m music_jax.main --config=mnist5k --config.seed=1 --workdir=runs/mnist5k-1
  python -m music_jax.main --config=cifar10 --workdir=runs/cifar10 --profile=200:209
  python -m music_jax.main --config=folder --config.dataset.path=photos \
      --workdir=gs://BUCKET/photos

A config file is Python code; --config=mnist5k is short for configs/mnist5k.py of this package.
Training needs the extra `data`; a workdir in gs:// also needs `gcs`, a GPU `gpu`, a TPU `tpu`.

Exit codes: 0 done; 2 wrong input; 3 diverged or unusable data; 75 stopped by a signal, all saved.
"""

import logging
import os
import pathlib
import shlex
import shutil
import sys

from absl import flags

from music_jax import cli


def main() -> None:
    """Reads the flags and trains."""
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    from music_jax.distributed import limit_malloc_arenas

    limit_malloc_arenas()
    from music_jax.train.profile import parse_steps

    text = flags.FLAGS.profile
    profile_steps = None if text is None else parse_steps(text)
    cli.join_cluster()
    from music_jax.config import validate
    from music_jax.distributed import cluster, progress
    from music_jax.distributed.mesh import use_cores, use_deterministic_gpu_operations
    from music_jax.distributed.signals import StopSignal
    from music_jax.train import train_and_evaluate
    from music_jax.workdir.compilation_cache import use_compilation_cache
    from music_jax.workdir.directory import absolute_path

    if flags.FLAGS.verbose:
        progress.log_to_stdout(logging.DEBUG)
    validate(config)
    use_cores(config.batch_size // config.accumulation_steps)
    absolute_path(workdir)  # checks it
    if config.deterministic:  # Before a log line can initialize the devices.
        use_deterministic_gpu_operations()
    use_compilation_cache()
    stop = StopSignal(alone=not cluster.has_peers(), grace_seconds=config.checkpoint.grace_seconds)
    train_and_evaluate(config, workdir, profile_steps=profile_steps, stop=stop)
    if sys.stdout.isatty():
        progress.say_lines(_next_commands(workdir, flags.FLAGS["import"].value or ""))


def _next_commands(workdir: str, modules: str) -> str:
    """Returns the commands that use a finished run, quoted for a shell, with their `--import`."""
    run = [f"--import={modules}"] * bool(modules) + [f"--workdir={workdir}"]
    file = os.path.join(workdir, "backbone.safetensors")
    commands = {
        "a report for a browser": ["report", *run],
        "more measures": ["evaluate", *run],
        "the backbone as a file": ["export", *run, "--format=safetensors", f"--output={file}"],
    }
    lines = ["", "Next:"]
    for purpose, (name, *arguments) in commands.items():
        command = shlex.join([_python(), "-m", f"music_jax.{name}", *arguments])
        lines.append(f"  {purpose:24s}{command}")
    return "\n".join(lines)


def _python() -> str:
    """Returns the shortest name of this interpreter in a shell."""
    if shutil.which("python") == os.path.join(os.path.dirname(sys.executable), "python"):
        return "python"
    path = pathlib.Path(sys.executable)
    return str(path.relative_to(os.getcwd()) if path.is_relative_to(os.getcwd()) else path)


if __name__ == "__main__":
    flags.DEFINE_string(
        "profile", None, "START:STOP, the steps to profile with JAX, into WORKDIR/profile."
    )
    flags.DEFINE_bool("verbose", False, "Also prints a table of all parameters.")
    cli.run(main, __doc__, workdir=True, processes=True, config="file", required=["workdir"])
