"""Counts of small programs, compared with sums by hand."""

import numpy as np
import pytest

from music_jax.plan import counts, hlo

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
    found = counts.collectives(hlo.parse(text), chips)
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
    assert counts.collectives(hlo.parse(text), _ALONE).by_kind == {kind: result}


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
    program = hlo.parse(_LOOP.replace("TRIPS", told))
    work = counts.work(program)
    assert work.flops == trips * 2 * 8**3
    # The product reads its operand twice and writes; the all-reduce reads and writes.
    assert work.bytes == work.hbm_bytes == trips * 5 * 256
    assert counts.work(program, loops_once=True).flops == 2 * 8**3
    found = counts.collectives(program, _ALONE)
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
    return counts.work(hlo.parse(_TEXT.replace("CALL", call))).flops


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
