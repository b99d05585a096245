"""`python -m music_jax.main`: pre-trains a backbone and probes it."""

from absl import flags
from ml_collections import config_flags

from music_jax import cli
from music_jax.errors import UserError

_USAGE = """
Pre-trains a vision backbone, then probes it. Run again with the same arguments, it goes on where it
was stopped; once finished, it says so.

  python -m music_jax.main --config=configs/mnist5k.py --workdir=runs/mnist5k
  python -m music_jax.main --config=configs/mnist5k.py --config.seed=1 --workdir=runs/mnist5k-1
  python -m music_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 --profile=200:209
  python -m music_jax.main --config=configs/folder.py --config.dataset.path=photos \\
      --workdir=gs://BUCKET/photos

Config files are Python and come with a clone, in configs/, not with the package. Training needs the
extra `data`: pip install 'music_jax[data]', and for gs:// `gcs`; for a GPU or TPU, `gpu` or `tpu`.

Exit codes: 0 done; 2 wrong input; 3 diverged or unusable data; 75 stopped by a signal, all saved.
"""


def main() -> None:
    """Reads the flags and trains."""
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config=FILE is missing, such as --config=configs/mnist5k.py")
    if not flags.FLAGS.workdir:
        raise UserError("--workdir=DIR is missing: the directory for checkpoints and results")
    from music_jax.distributed.cores import limit_malloc_arenas

    limit_malloc_arenas()
    from music_jax.train.profile import parse_steps

    text = flags.FLAGS.profile
    profile_steps = None if text is None else parse_steps(text)
    cli.join_cluster()
    from music_jax.config import validate
    from music_jax.distributed import failure_propagation
    from music_jax.distributed.mesh import use_cores, use_repeatable_gpu_operations
    from music_jax.distributed.signals import StopSignal
    from music_jax.train import train_and_evaluate
    from music_jax.workdir import records
    from music_jax.workdir.compilation_cache import use_compilation_cache

    validate(config)
    use_cores(config.batch_size // config.accumulation_steps)
    workdir = flags.FLAGS.workdir
    records.check_reachable(workdir)
    if config.deterministic:  # before a line that is printed may start the devices
        use_repeatable_gpu_operations()
    use_compilation_cache()
    stop = StopSignal(
        alone=not failure_propagation.exist(), grace_seconds=config.checkpoint.grace_seconds
    )
    train_and_evaluate(config, workdir, profile_steps=profile_steps, stop=stop)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "The config file; --config.FIELD=VALUE overrides any of its fields."
    )
    flags.DEFINE_string(
        "profile", None, "START:STOP, steps that a JAX profile is recorded of, in WORKDIR/profile."
    )
    cli.run(main, _USAGE)
