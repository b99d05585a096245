"""FLOPs of cuDNN's and cuBLAS's calls, as XLA writes them, and GPUs that are not there."""

import importlib.util
import json

import processes
import pytest

from music_jax.plan import counts, gpus, hlo
from music_jax.plan.chips import CHIPS

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


def test_usable_memory_is_the_share_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert gpus.H100.usable_bytes == 0.75 * gpus.H100.memory_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert gpus.H100.usable_bytes == 0.9 * gpus.H100.memory_bytes
    assert 79 * 2**30 < gpus.H100.memory_bytes < 80 * 2**30


def test_each_gpus_memory_bandwidth_reaches_the_compiler():
    chip = CHIPS["h200"]
    assert "memory_bandwidth: 4800000000000" in chip.gpu.target(chip.hbm_bytes_per_second)


def _has_plugin():
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _has_plugin(), reason="JAX's CUDA plugin is not installed")
def test_a_small_config_is_planned_for_gpus_that_are_not_there(tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = processes.run(
        "music_jax.plan",
        processes.DIGITS,
        "--config.batch_size=64",
        "--topology=h100:4",
        f"--json={file}",
        "--num-images=1437",
    )
    assert (code, err) == (0, "")
    (plan,) = json.loads(file.read_text())
    assert plan["fits"]
    assert plan["chips"] == 4
    assert 0 < plan["objective_flops"] < plan["flops"]
    assert "~" in out
    assert "flops" in plan["estimates"]
