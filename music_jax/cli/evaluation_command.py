"""How the commands that evaluate a run begin."""

from absl import flags
from ml_collections import config_flags

from music_jax import cli
from music_jax.errors import UserError


def begin() -> tuple[str, dict[str, object]]:
    """Reads the flags that such commands share, and joins the run's other processes.

    Returns:
      The workdir, and the config fields given on the command line, by dotted name.

    Raises:
      UserError: the workdir is missing or cannot be reached.
    """
    workdir = flags.FLAGS.workdir
    if not workdir:
        raise UserError("--workdir=DIR is missing: the directory of the run to evaluate")
    from music_jax.distributed.mesh import use_cores
    from music_jax.workdir.directory import check_reachable
    from music_jax.workdir.user_directories import use_compilation_cache

    cli.join_cluster()
    use_cores(batch_size=4)  # any batch is filled up, so that all devices get some of it
    check_reachable(workdir)
    use_compilation_cache()
    return workdir, dict(config_flags.get_override_values(flags.FLAGS["config"]))
