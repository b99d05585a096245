"""Counts of programs that XLA has compiled for four TPU v5e chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from music_jax.plan import compiling, counts

_TURNS = 5


def _compile(function, slice_, *arguments):
    """Arguments are (shape, dtype, spec)."""
    shapes = [
        jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(slice_.mesh, PartitionSpec(*spec))
        )
        for shape, dtype, spec in arguments
    ]
    return jax.jit(function).lower(*shapes).compile()


def _on_each(slice_, function):
    """`function` on each device's rows."""
    rows = PartitionSpec("data")
    return jax.shard_map(function, mesh=slice_.mesh, in_specs=rows, out_specs=rows, check_vma=False)


@pytest.mark.parametrize(
    ("function", "kind", "result", "received"),
    [
        # 256 float32 rows of 128 a device are 131,072 bytes.
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 131072, 2 * 3 / 4 * 131072),
        (lambda x: jax.lax.all_gather(x, "data"), "all-gather", 4 * 131072, 3 * 131072),
        (
            lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
            "reduce-scatter",
            131072 / 4,
            3 * 131072 / 4,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            "all-to-all",
            131072,
            3 / 4 * 131072,
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
            "collective-permute",
            131072,
            131072,
        ),
    ],
)
def test_collectives_by_kind(four_chips, function, kind, result, received):
    compiled = _compile(
        _on_each(four_chips, function), four_chips, ((1024, 128), "float32", ("data",))
    )
    found = counts.collectives(compiling.read(compiled), range(4))
    assert found.by_kind == {kind: result}
    assert found.received == received


def test_collectives_of_groups_of_devices(four_chips):
    def pairs(x):
        return jax.lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]])

    compiled = _compile(
        _on_each(four_chips, pairs), four_chips, ((1024, 128), "float32", ("data",))
    )
    found = counts.collectives(compiling.read(compiled), range(4))
    assert found.received == pytest.approx(2 * 1 / 2 * 131072)


@pytest.mark.parametrize("layers", [2, 8])
def test_a_collective_counts_once_whatever_it_overlaps_with(four_chips, layers):
    def step(x, gathered, weights):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return x @ gathered

    arguments = (
        ((4096, 2048), ("data",)),
        ((2048, 4096), ("data",)),
        *[((2048, 2048), ())] * layers,
    )
    x, gathered, *weights = (
        jax.ShapeDtypeStruct(
            shape, "bfloat16", sharding=NamedSharding(four_chips.mesh, PartitionSpec(*spec))
        )
        for shape, spec in arguments
    )
    rows = NamedSharding(four_chips.mesh, PartitionSpec("data"))
    compiled = jax.jit(step, out_shardings=rows).lower(x, gathered, weights).compile()
    program = compiling.read(compiled)
    # It starts, it ends, and each layer is computed with it going on.
    assert compiled.as_text().count("chain_id") == layers + 2
    found = counts.collectives(program, range(4))
    assert found.by_kind == {"all-gather": 2048 * 4096 * 2}
    assert found.received == 3 / 4 * 2048 * 4096 * 2
    assert counts.work(program).bytes < compiled.cost_analysis()["bytes accessed"]


def _looping(body):
    def looped(x):
        return jax.lax.scan(lambda carry, _: (body(carry), None), x, length=_TURNS)[0]

    return looped


def test_collectives_in_a_loop_count_in_each_iteration(four_chips):
    body = _looping(lambda x: jnp.tanh(jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3)])))
    compiled = _compile(_on_each(four_chips, body), four_chips, ((1024, 128), "float32", ("data",)))
    found = counts.collectives(compiling.read(compiled), range(4))
    assert found.by_kind == {"collective-permute": _TURNS * 131072}


def test_a_loop_of_products_counts_all_iterations(four_chips):
    body = _looping(lambda x: jnp.tanh(x @ x))
    compiled = _compile(body, four_chips, ((1024, 1024), "bfloat16", ()))
    products = 2 * 1024**3
    assert compiled.cost_analysis()["flops"] < 1.1 * products  # XLA's own figure is of one turn
    flops, traffic = compiling.costs(compiled, compiling.read(compiled))
    np.testing.assert_allclose(flops, _TURNS * products, rtol=0.05)
    assert traffic > compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("dearest", [0, 1])
def test_only_the_most_expensive_branch_of_a_conditional_counts(four_chips, dearest):
    def one(x):
        return jnp.tanh(x @ x)

    branches = [one, one]
    branches[dearest] = _looping(one)

    def step(x):
        return jax.lax.cond(x[0, 0] > 0, *branches, x)

    compiled = _compile(step, four_chips, ((1024, 1024), "bfloat16", ()))
    program = compiling.read(compiled)
    opcodes = [line.opcode for lines in program.computations.values() for line in lines.values()]
    assert "conditional" in opcodes
    products = _TURNS * 2 * 1024**3
    assert counts.work(program).flops == products
    np.testing.assert_allclose(compiling.costs(compiled, program)[0], products, rtol=0.05)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((8, 16, 16, 64), (3, 3, 64, 128), {"padding": "SAME"}),
        ((8, 16, 16, 64), (3, 3, 64, 128), {"padding": "SAME", "window_strides": (2, 2)}),
        ((8, 32, 32, 3), (7, 7, 3, 64), {"padding": [(3, 3), (3, 3)], "window_strides": (2, 2)}),
    ],
)
def test_flops_of_a_convolution_and_its_gradients_are_xlas(four_chips, shape, kernel, options):
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **{"window_strides": (1, 1)} | options,
    )
    step = jax.grad(lambda x, w: jnp.sum(convolve(x, w).astype(jnp.float32) ** 2), (0, 1))
    compiled = _compile(step, four_chips, (shape, "bfloat16", ()), (kernel, "bfloat16", ()))
    found = counts.work(compiling.read(compiled)).flops
    np.testing.assert_allclose(found, compiled.cost_analysis()["flops"], rtol=0.05)


def test_what_stays_on_the_chip_is_not_hbm_traffic(four_chips):
    def step(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    argument = ((2048, 2048), "bfloat16", ())
    program = compiling.read(_compile(step, four_chips, argument, argument))
    found = counts.work(program)
    # Both arguments are read and the result is written, of 8.4 MB each; what is between fits on it.
    assert 3 * 2048**2 * 2 <= found.hbm_bytes < found.bytes
