"""Restoring a run's network for use outside of training."""

import os
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.errors import UserError
from music_jax.models.network import Network, Tree, init_network, make_network
from music_jax.workdir.directory import absolute_path


class RestoredNetwork(NamedTuple):
    """A network with the variables of a checkpoint, replicated on every device."""

    step: int
    network: Network
    params: Tree
    batch_stats: Tree


def restore_network(
    workdir: epath.Path, config: config_dict.ConfigDict, checkpoint: str | None, mesh: Mesh
) -> RestoredNetwork:
    """Restores the network of a run without changing the run.

    Args:
      workdir: Workdir of the run, as an absolute path.
      config: The run's config.
      checkpoint: The checkpoint's step or directory; None for the latest valid one.
      mesh: The devices to restore onto.

    Raises:
      UserError: There is no such checkpoint, or it is damaged.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, batch_stats = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda: init_network(config, jax.random.key(0))),
    )
    target = {"params": params, "batch_stats": batch_stats}
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if checkpoint is None:
            step = checkpoints.latest_valid_step()
        else:
            step = _named_step(checkpoint, workdir, checkpoints.all_steps())
            checkpoints.check_valid(step)
        if step is None:
            raise UserError(f"{workdir} has no checkpoint yet")
        restored = checkpoints.restore(step, target, partial=True)
    finally:
        checkpoints.close()
    return RestoredNetwork(step, make_network(config), restored["params"], restored["batch_stats"])


def _named_step(checkpoint: str, workdir: epath.Path, steps: list[int]) -> int:
    name = checkpoint.rstrip("/").rpartition("/")[2]
    if "/" in checkpoint:
        parent = os.fspath(absolute_path(checkpoint.rstrip("/")).parent)
        own = os.fspath(workdir / "checkpoints")
        if "://" not in own:
            parent, own = os.path.realpath(parent), os.path.realpath(own)
        if parent != own:
            raise UserError(f"--checkpoint={checkpoint} is not below {workdir}/checkpoints")
    if not name.isdigit() or int(name) not in steps:
        known = ", ".join(str(step) for step in sorted(steps)) or "none"
        raise UserError(f"there is no checkpoint {checkpoint!r}; the run has the steps {known}")
    return int(name)
