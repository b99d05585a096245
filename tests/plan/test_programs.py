"""Counts of small programs by hand, and of programs compiled for four TPU v5e chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from music_jax.plan import programs

# Eight devices on four chips, neighbors on one chip, as on TPU v3 and tpu7x.
_TWO_A_CHIP = (0, 0, 1, 1, 2, 2, 3, 3)
_ALONE = tuple(range(8))

_COLLECTIVE = """
ENTRY %main (x: f32[2,100]) -> f32[16,100] {{
  %x = f32[2,100]{{1,0}} parameter(0)
  ROOT %y = {result} {kind}(%x), {groups}
}}
"""
_ALL = "replica_groups={{0,1,2,3,4,5,6,7}}"


@pytest.mark.parametrize(
    ("kind", "result", "groups", "chips", "received"),
    [
        # 16 rows of 400 bytes; a device holds 2 of them, a chip of two devices 4.
        ("all-gather", "f32[16,100]", _ALL, _ALONE, 14 * 400),
        ("all-gather", "f32[16,100]", _ALL, _TWO_A_CHIP, 12 * 400),
        ("all-gather", "f32[16,100]", "replica_groups=[1,8]<=[8]", _TWO_A_CHIP, 12 * 400),
        ("all-gather", "f32[16,100]", "replica_groups={}", _TWO_A_CHIP, 12 * 400),
        # A chip lacks the sums of three other chips, which come to it, and it gets the rest added.
        ("all-reduce", "f32[2,100]", _ALL, _ALONE, 2 * 7 / 8 * 800),
        ("all-reduce", "f32[2,100]", _ALL, _TWO_A_CHIP, 2 * 3 / 4 * 800),
        # Of 8 devices with 16 rows each, a device keeps 2 rows, for which 7 others send theirs.
        ("reduce-scatter", "f32[2,100]", _ALL, _ALONE, 7 * 800),
        ("reduce-scatter", "f32[2,100]", _ALL, _TWO_A_CHIP, 6 * 800),
        # Each device gets 100 bytes of each: from 7 others, or from the 6 of other chips.
        ("all-to-all", "f32[2,100]", _ALL, _ALONE, 7 * 100),
        ("all-to-all", "f32[2,100]", _ALL, _TWO_A_CHIP, 2 * 6 * 100),
        # Pairs on one chip send nothing over the network.
        ("all-gather", "f32[4,100]", "replica_groups={{0,1},{2,3},{4,5},{6,7}}", _TWO_A_CHIP, 0),
        ("all-gather", "f32[4,100]", "replica_groups=[4,2]<=[8]", _TWO_A_CHIP, 0),
        ("all-reduce", "f32[2,100]", "replica_groups=mesh[a=4,b=2] {b}", _TWO_A_CHIP, 0),
        # Two groups, each of one device of each chip: a chip receives for both of its devices.
        ("all-gather", "f32[8,100]", "replica_groups=[2,4]<=[4,2]T(1,0)", _TWO_A_CHIP, 2 * 6 * 400),
        ("all-gather", "f32[8,100]", "replica_groups={{0,2,4,6},{1,3,5,7}}", _TWO_A_CHIP, 4800),
        ("all-reduce", "f32[2,100]", "replica_groups=mesh[a=4,b=2] {a}", _TWO_A_CHIP, 2 * 1200),
        # Two groups, each of the four devices of two chips.
        ("all-gather", "f32[8,100]", "replica_groups=[2,4]<=[8]", _TWO_A_CHIP, 4 * 400),
        ("collective-permute", "f32[2,100]", "source_target_pairs={{0,1},{2,3}}", _TWO_A_CHIP, 0),
        (
            "collective-permute",
            "f32[2,100]",
            "source_target_pairs={{0,2},{1,2}}",
            _TWO_A_CHIP,
            1600,
        ),
    ],
)
def test_bytes_received_from_other_chips(kind, result, groups, chips, received):
    text = _COLLECTIVE.format(kind=kind, result=result + "{1,0}", groups=groups)
    found = programs.collectives(programs.parse(text), chips)
    assert found.received == pytest.approx(received)
    rows = int(result.partition("[")[2].partition(",")[0])
    assert found.by_kind == {kind: rows * 400}


@pytest.mark.parametrize(
    ("kind", "arrays", "result"),
    [
        # Of what a start gives the results alone count, not its operands and counters.
        ("all-gather", "(f32[2,100]{1,0}, f32[16,100]{1,0})", 16 * 400),
        ("all-gather", "((f32[2,100]{1,0}, f32[3]{0}), (f32[16,100]{1,0}, f32[24]{0}))", 6400 + 96),
        ("collective-permute", "(f32[2,100]{1,0}, f32[2,100]{1,0}, u32[]{:S(2)}, u32[])", 2 * 400),
        ("all-reduce", "f32[2,100]{1,0}", 2 * 400),
    ],
)
def test_a_collective_that_starts_and_ends_counts_its_result_once(kind, arrays, result):
    pairs = ", source_target_pairs={{0,1},{1,0}}" if kind == "collective-permute" else ""
    text = f"""
ENTRY %main (x: f32[2,100]) -> f32[2,100] {{
  %x = f32[2,100]{{1,0}} parameter(0)
  %s = {arrays} {kind}-start(%x){pairs}
  ROOT %d = f32[2,100]{{1,0}} {kind}-done(%s)
}}
"""
    assert programs.collectives(programs.parse(text), _ALONE).by_kind == {kind: result}


_RECEIVED = """
ENTRY %main (x: f32[2,100]) -> f32[2,100] {{
  %x = f32[2,100]{{1,0}} parameter(0)
  %token = token[] after-all()
  %s = (f32[2,100]{{1,0}}, u32[], token[]) send(%x, %token), is_host_transfer=true, \
frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %r = (f32[2,100]{{1,0}}, u32[], token[]) recv(%token), is_host_transfer=true, \
frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %d = (f32[2,100]{{1,0}}, token[]) recv-done(%r), is_host_transfer=true
  ROOT %y = f32[2,100]{{1,0}} get-tuple-element(%d), index=0
}}
"""


@pytest.mark.parametrize(
    ("kind", "target", "received"),
    [
        # 800 bytes come from the host, of which the other slices have sent a part.
        ("ALL_REDUCE", '"{1,2}x{0:3}"', 800),
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', 2 * 3 / 4 * 800),
        ("ALL_GATHER", '"{1,2}x{0:3}"', 400),
        ("REDUCE_SCATTER", '"{1,2}x{0:3}"', 800),
        ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", 400),
        ("ONE_TO_ONE", '"{1,2}x{0:3}"', 800),
    ],
)
def test_bytes_received_from_other_slices(kind, target, received):
    program = programs.parse(_RECEIVED.format(kind=kind, target=target))
    found = programs.collectives(program, range(4))
    assert found == programs.Collectives(0.0, {}, received, 1)


_LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = f32[8,8]{1,0} all-reduce(%y), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%i, %g)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %x = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%x), condition=%condition, body=%bodyTRIPS
}
"""


@pytest.mark.parametrize(
    ("told", "trips"),
    [
        ("", 6),  # by the condition: from 0 while less than 6
        (', backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_a_loop_body_counts_once_per_iteration(told, trips):
    program = programs.parse(_LOOP.replace("TRIPS", told))
    work = programs.work(program)
    assert work.flops == trips * 2 * 8**3
    # The product reads its operand twice and writes; the all-reduce reads and writes.
    assert work.bytes == work.hbm_bytes == trips * 5 * 256
    assert programs.work(program, loops_once=True).flops == 2 * 8**3
    found = programs.collectives(program, _ALONE)
    assert found.by_kind == {"all-reduce": trips * 256}
    np.testing.assert_allclose(found.received, trips * 2 * 7 / 8 * 256)


_CONVOLUTION = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
_TEXT = """
ENTRY %main (x: bf16[128,56,56,64], w: bf16[32,3,3,64], y: bf16[128,56,56,32]) -> bf16[] {
  %x = bf16[128,56,56,64]{3,2,1,0} parameter(0)
  %w = bf16[32,3,3,64]{3,2,1,0} parameter(1)
  %y = bf16[128,56,56,32]{3,2,1,0} parameter(2)
  %call = CALL
}
"""


def _flops(call):
    return programs.work(programs.parse(_TEXT.replace("CALL", call))).flops


@pytest.mark.parametrize(
    "call",
    [
        "(bf16[128,56,56,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), WINDOW, "
        'custom_call_target="__cudnn$convForward"',
        "(bf16[128,56,56,64]{3,2,1,0}, u8[0]{0}) custom-call(%y, %w), WINDOW, "
        'custom_call_target="__cudnn$convBackwardInput"',
        "(bf16[32,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), WINDOW, "
        'custom_call_target="__cudnn$convBackwardFilter"',
    ],
)
def test_a_convolution_and_its_gradients_cost_the_same(call):
    # Of 56 positions of a side, the kernel's 3 x 3 leaves the image at the border.
    positions = (3 * 56 - 2) ** 2
    assert _flops(call.replace("WINDOW", _CONVOLUTION)) == 2 * 128 * 64 * 32 * positions


def test_a_product_of_cublas():
    call = (
        "(bf16[128,56,56,32]{3,2,1,0}, s8[4]{0}) custom-call(%x, %w), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["3"]}}}'
    )
    assert _flops(call) == 2 * 128 * 56 * 56 * 32 * 64


def test_other_calls_are_no_products():
    assert _flops('bf16[4]{0} custom-call(%x, %w), custom_call_target="Other"') == 0


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
    found = programs.collectives(programs.read(compiled), range(4))
    assert found.by_kind == {kind: result}
    assert found.received == received


def test_collectives_of_groups_of_devices(four_chips):
    def pairs(x):
        return jax.lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]])

    compiled = _compile(
        _on_each(four_chips, pairs), four_chips, ((1024, 128), "float32", ("data",))
    )
    found = programs.collectives(programs.read(compiled), range(4))
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
    program = programs.read(compiled)
    # It starts, it ends, and each layer is computed with it going on.
    assert compiled.as_text().count("chain_id") == layers + 2
    found = programs.collectives(program, range(4))
    assert found.by_kind == {"all-gather": 2048 * 4096 * 2}
    assert found.received == 3 / 4 * 2048 * 4096 * 2
    assert programs.work(program).bytes < compiled.cost_analysis()["bytes accessed"]


def _looping(body):
    def looped(x):
        return jax.lax.scan(lambda carry, _: (body(carry), None), x, length=_TURNS)[0]

    return looped


def test_collectives_in_a_loop_count_in_each_iteration(four_chips):
    body = _looping(lambda x: jnp.tanh(jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3)])))
    compiled = _compile(_on_each(four_chips, body), four_chips, ((1024, 128), "float32", ("data",)))
    found = programs.collectives(programs.read(compiled), range(4))
    assert found.by_kind == {"collective-permute": _TURNS * 131072}


def test_a_loop_of_products_counts_all_iterations(four_chips):
    body = _looping(lambda x: jnp.tanh(x @ x))
    compiled = _compile(body, four_chips, ((1024, 1024), "bfloat16", ()))
    products = 2 * 1024**3
    assert compiled.cost_analysis()["flops"] < 1.1 * products  # XLA's own figure is of one turn
    flops, traffic = programs.costs(compiled, programs.read(compiled))
    np.testing.assert_allclose(flops, _TURNS * products, rtol=0.05)
    assert traffic > compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("steps", [4, 64])
def test_a_loop_accesses_slices_of_its_arrays(four_chips, steps):
    def running_mean(xs):
        return jax.lax.scan(lambda mean, x: (jnp.tanh(mean + x), 2 * mean), jnp.zeros(2**16), xs)

    compiled = _compile(running_mean, four_chips, ((steps, 2**16), "float32", ()))
    program = programs.read(compiled)
    assert any(instruction.opcode == "while" for instruction in program)
    once = programs.work(program, loops_once=True).bytes
    np.testing.assert_allclose(once, compiled.cost_analysis()["bytes accessed"], rtol=0.2)
    # A step reads the mean twice and a row of `xs`, and writes the mean and a row of the result.
    slices = 5 * 2**16 * 4
    assert slices * steps <= programs.costs(compiled, program)[1] < 2 * slices * (steps + 1)


@pytest.mark.parametrize("dearest", [0, 1])
def test_only_the_most_expensive_branch_of_a_conditional_counts(four_chips, dearest):
    def one(x):
        return jnp.tanh(x @ x)

    branches = [one, one]
    branches[dearest] = _looping(one)

    def step(x):
        return jax.lax.cond(x[0, 0] > 0, *branches, x)

    compiled = _compile(step, four_chips, ((1024, 1024), "bfloat16", ()))
    program = programs.read(compiled)
    assert "conditional" in [instruction.opcode for instruction in program]
    products = _TURNS * 2 * 1024**3
    assert programs.work(program).flops == products
    np.testing.assert_allclose(programs.costs(compiled, program)[0], products, rtol=0.05)


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
    found = programs.work(programs.read(compiled)).flops
    np.testing.assert_allclose(found, compiled.cost_analysis()["flops"], rtol=0.05)


def test_what_stays_on_the_chip_is_not_hbm_traffic(four_chips):
    def step(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    argument = ((2048, 2048), "bfloat16", ())
    program = programs.read(_compile(step, four_chips, argument, argument))
    found = programs.work(program)
    # Both arguments are read and the result is written, of 8.4 MB each; what is between fits on it.
    assert 3 * 2048**2 * 2 <= found.hbm_bytes < found.bytes
