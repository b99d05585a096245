"""Names of topologies, and the published peaks against those that the documentation gives."""

import pytest

from music_jax.errors import UserError
from music_jax.plan.chips import (
    CHIPS,
    H100,
    attached_topology,
    check_has_slices,
    chip_of,
    network_peak,
)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_each_chip_knows_its_own_example(chip):
    assert chip_of(chip.example) is chip


def test_peaks_of_v5e_are_the_documented_ones():
    chip = CHIPS["v5e"]
    # 197 TFLOPs, 819 GBps, and 1,600 Gbps of links, which are 200 GB/s.
    assert chip.flops_per_second == 197e12
    assert chip.hbm_bytes_per_second == 819e9
    assert chip.network_bytes_per_second == 1600e9 / 8


def test_peaks_of_h100_are_the_datasheets_without_sparsity():
    chip = CHIPS["h100"]
    # 1,979 TFLOPS with sparsity, 3.35 TB/s, and 900 GB/s of NVLink in both directions.
    assert chip.flops_per_second == pytest.approx(1979e12 / 2, rel=1e-3)
    assert chip.hbm_bytes_per_second == 3350e9
    assert chip.network_bytes_per_second == 900e9 / 2


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v6:2x2", "did you mean 'v6e'"),
        ("gpu:h100:8", r"unknown chip 'gpu'.*v5e:4x8"),
        ("v5e", "expected 2 sizes joined by x after 'v5e', such as v5e:4x8; got ''"),
        ("v5e:4x4x4", "expected 2 sizes"),
        ("v4:2x2", "expected 3 sizes"),
        ("v5e:0x2", "expected 2 sizes"),
        ("v5e:4x8;rm", "expected 2 sizes"),
        ("h100", "expected 1 to 8 GPUs after 'h100', .* such as h100:8; got ''"),
        ("h100:0", "expected 1 to 8 GPUs"),
        ("h100:16", "expected 1 to 8 GPUs"),
        ("h100:2x4", "expected 1 to 8 GPUs"),
    ],
)
def test_malformed_topologies_are_errors(topology, expected):
    with pytest.raises(UserError, match=expected):
        chip_of(topology)


@pytest.mark.parametrize(
    ("topology", "links", "published"),
    [
        # Two links an axis in a ring, one at the end of a row, none where there is one chip.
        ("v5e:1x1", 0 / 4, 200e9),
        ("v5e:1x2", 1 / 4, 200e9),
        ("v5e:2x2", 2 / 4, 200e9),
        ("v5e:4x8", 2 / 4, 200e9),
        ("v5e:8x16", 3 / 4, 200e9),
        ("v6e:16x16", 4 / 4, 400e9),
        ("v3:2x2", 2 / 4, 280e9),
        ("v3:32x32", 4 / 4, 280e9),
        ("v4:2x2x1", 2 / 6, 300e9),
        ("v4:2x4x4", 3 / 6, 300e9),
        ("v4:4x4x8", 6 / 6, 300e9),
        ("tpu7x:2x2x1", 2 / 6, 600e9),
        ("h100:2", 1, 450e9),
    ],
)
def test_the_network_peak_is_that_of_the_chip_with_the_fewest_links(topology, links, published):
    assert network_peak(topology) == pytest.approx(links * published)


@pytest.mark.parametrize("topology", ["v3:2x2", "v4:4x4x4", "h100:8"])
def test_slices_without_a_published_network_are_an_error(topology):
    with pytest.raises(UserError, match="not published; it is for v5e, v5p, v6e, tpu7x"):
        check_has_slices(topology)


def test_the_network_between_slices_is_the_documented_one():
    # The page of v5e gives 6.4 Tb/s for a pod of 256 chips, that of v6e 25.6 Tb/s.
    assert CHIPS["v5e"].dcn_bytes_per_second == 6.4e12 / 8 / 256
    assert CHIPS["v6e"].dcn_bytes_per_second == 25.6e12 / 8 / 256


def _with_gpus(directory, monkeypatch, *names):
    """Installs an `nvidia-smi` that lists these GPUs."""
    command = directory / "nvidia-smi"
    command.write_text("#!/bin/sh\n" + "".join(f"echo '{name}'\n" for name in names))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_this_machines_gpus_are_a_topology(tmp_path, monkeypatch):
    _with_gpus(tmp_path, monkeypatch, *["NVIDIA H100 80GB HBM3"] * 4)
    assert attached_topology() == "h100:4"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "are not found by nvidia-smi; name chips such as h100:8"),
        (("NVIDIA L4",), "are NVIDIA L4, whose peaks are not known here"),
        (("NVIDIA H200", "NVIDIA L4"), "are of 2 kinds: NVIDIA H200, NVIDIA L4"),
    ],
)
def test_missing_or_unknown_gpus_are_errors(tmp_path, monkeypatch, names, expected):
    _with_gpus(tmp_path, monkeypatch, *names)
    with pytest.raises(UserError, match=expected):
        attached_topology()


def test_without_a_driver_no_gpu_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="are not found by nvidia-smi"):
        attached_topology()


def test_usable_memory_is_the_share_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert H100.usable_bytes == 0.75 * H100.memory_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert H100.usable_bytes == 0.9 * H100.memory_bytes
    assert 79 * 2**30 < H100.memory_bytes < 80 * 2**30


def test_each_gpus_memory_bandwidth_reaches_the_compiler():
    chip = CHIPS["h200"]
    assert "memory_bandwidth: 4800000000000" in chip.gpu.target(chip.hbm_bytes_per_second)
