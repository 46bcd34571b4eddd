"""The precision that the hardware decides."""

import logging

import pytest
import torch

from cond_diffusion import device
from cond_diffusion.device import choose_precision, cores_of_this_process, share_cores

HAS_BF16 = device.has_bf16  # which the tests replace by False


@pytest.mark.parametrize(
    ("requested", "kind", "has_bf16", "expected"),
    [
        *(("auto", "cpu", True, "bf16"), ("auto", "cpu", False, "fp32"), ("auto", "mps", True, "fp32")),
        *(("auto", "cuda", True, "bf16"), ("auto", "cuda", False, "fp32")),
        *(("fp32", "cpu", True, "fp32"), ("bf16", "cpu", False, "bf16"), ("fp16", "cuda", False, "fp16")),
    ],
)
def test_auto_is_bf16_where_the_device_is_faster_in_it_and_is_logged(
    requested: str,
    kind: str,
    has_bf16: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(device, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    with caplog.at_level(logging.INFO):
        assert choose_precision(requested, torch.device(kind), "dtype") == expected
    assert (expected in caplog.text) == (requested == "auto" or (kind == "cpu" and expected == "bf16"))


@pytest.mark.parametrize(
    ("environment", "cores", "threads"),
    [
        ({}, 8, [8]),
        ({"OMP_NUM_THREADS": "1"}, 8, [8]),  # as launchers set it
        ({"OMP_NUM_THREADS": "3"}, 8, []),  # the user's choice
        ({"LOCAL_WORLD_SIZE": "2"}, 4, [4]),
        ({"LOCAL_WORLD_SIZE": "20"}, 1, [1]),
    ],
)
def test_the_processes_of_a_machine_share_its_cores(
    environment: dict[str, str], cores: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {*range(8)}, raising=False)
    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    share_cores()
    assert cores_of_this_process() == cores
    assert set_to == threads


@pytest.mark.parametrize(
    ("machine", "mkldnn", "bf16", "avx512", "expected"),
    [
        ("x86_64", True, True, True, True),
        ("x86_64", True, True, False, False),  # AVX-512 without bf16
        ("AMD64", True, True, False, False),
        ("aarch64", True, True, False, True),
        ("aarch64", True, False, False, False),
        ("arm64", False, False, False, False),  # without oneDNN
    ],
)
def test_bf16_instructions_are_found(
    machine: str, mkldnn: bool, bf16: bool, avx512: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: mkldnn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert HAS_BF16() == expected
