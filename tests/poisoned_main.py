"""`python -m tests.poisoned_main POISON ARGS`: `music_jax.main` in which some steps fail.

POISON is KIND:STEP[,KIND:STEP...] on configs/digits.py at batch 128:
nan, leap, flat: the step's embeddings become not finite, large, or all alike;
flip: after the step one bit of one parameter flips on the last device, once in a process.
"""

import dataclasses
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np

_RECORDS, _BATCH = 1437, 128
_FACTORS = {"nan": np.nan, "leap": 100.0, "flat": 0.0}


def _first_sample(step):
    epoch, in_epoch = divmod(step - 1, _RECORDS // _BATCH)
    return epoch * _RECORDS + in_epoch * _BATCH


def poison_batches(kinds):
    from music_jax.train import step as step_lib

    embed = step_lib._embed

    def poisoned(recipe, mesh, params, batch_stats, images, sample_index):
        embeddings, batch_stats = embed(recipe, mesh, params, batch_stats, images, sample_index)
        for kind, step in kinds:
            here = jnp.any(sample_index == np.uint32(_first_sample(step)))
            factor = jnp.where(here, _FACTORS[kind], 1.0).astype(embeddings.dtype)
            embeddings = embeddings * factor
        return embeddings, batch_stats

    step_lib._embed = poisoned


def flip_a_bit(state):
    """The state, of which the last device holds another bit in one replicated parameter."""
    leaves, structure = jax.tree.flatten(state.params)
    i = next(i for i, x in enumerate(leaves) if x.sharding.is_fully_replicated)
    last = max(jax.devices(), key=lambda device: device.id)
    buffers = []
    for shard in leaves[i].addressable_shards:
        value = np.array(shard.data)
        if shard.device == last:
            value.view(np.uint8).reshape(-1)[0] ^= 1
        buffers.append(jax.device_put(value, shard.device))
    leaves[i] = jax.make_array_from_single_device_arrays(
        leaves[i].shape, leaves[i].sharding, buffers
    )
    return dataclasses.replace(state, params=jax.tree.unflatten(structure, leaves))


def flip_after(steps):
    from music_jax.train import loop

    compile_step, left = loop.compile_step, set(steps)

    def compiled(*arguments):
        step_function = compile_step(*arguments)

        def step(state, *batch):
            state, metrics = step_function(state, *batch)
            number = int(state.step)
            if number in left:
                left.remove(number)
                state = flip_a_bit(state)
            return state, metrics

        return step

    loop.compile_step = compiled


def main():
    poison = [part.split(":") for part in sys.argv.pop(1).split(",")]
    poison = [(kind, int(step)) for kind, step in poison]
    batches = [(kind, step) for kind, step in poison if kind in _FACTORS]
    flips = [step for kind, step in poison if kind == "flip"]
    if batches:
        poison_batches(batches)
    if flips:
        import music_jax.distributed.mesh

        use_cores = music_jax.distributed.mesh.use_cores

        def then_flip(batch_size):  # the devices may be looked at only from here on
            use_cores(batch_size)
            flip_after(flips)

        music_jax.distributed.mesh.use_cores = then_flip
    runpy.run_module("music_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
