"""The precision that the hardware decides."""

import logging

import pytest
import torch

from cond_diffusion import device
from cond_diffusion.device import choose_precision


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
