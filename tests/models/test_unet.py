"""The UNet agrees with diffusers' UNet2DConditionModel in keys, shapes, outputs and files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from cond_diffusion import UNet, UNetConfig
from cond_diffusion.config.unet import from_diffusers, to_diffusers
from cond_diffusion.device import DTYPES, autocast
from cond_diffusion.errors import UserError

SMALL = UNetConfig(channels=(16, 32), num_groups=8, num_heads=2, in_channels=1, sample_size=8, context_dim=12)
CONFIGS = {
    "grayscale": SMALL,
    "rgb": replace(SMALL, in_channels=3),
    "attention at the first level": replace(SMALL, attention=(True, True)),
    "attention in the middle only": replace(SMALL, attention=(False, False)),
    "two blocks a level": replace(SMALL, blocks_per_level=2, attention=(True, False)),
    "heads by level, three levels": replace(
        SMALL, channels=(16, 32, 64), attention=(True, False, True), num_heads=(1, 2, 8)
    ),
    "linear projection": replace(SMALL, linear_projection=True, blocks_per_level=2, norm_eps=1e-6),
    "odd size": replace(SMALL, channels=(16, 16, 32), attention=(False, True, True), sample_size=7),
    "one level": replace(SMALL, channels=(16,), attention=(True,)),
}


def randomized(unet: torch.nn.Module) -> torch.nn.Module:
    """Replace the weights, some of which are initialized to zero, by random ones."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.normal_(0.02, 0.15, generator=draw)
    return unet.eval()


def inputs(config: UNetConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    assert config.in_channels is not None
    assert config.sample_size is not None
    assert config.context_dim is not None
    x_t = torch.randn(3, config.in_channels, config.sample_size, config.sample_size, generator=draw)
    return x_t, torch.tensor([0, 500, 999]), torch.randn(3, 5, config.context_dim, generator=draw)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_outputs_equal_those_of_diffusers_with_the_same_weights(config: UNetConfig):
    theirs = randomized(UNet2DConditionModel.from_config(to_diffusers(config)))
    ours = UNet(config)
    ours.load_state_dict(theirs.state_dict())
    x_t, t, context = inputs(config)
    expected = theirs(x_t, t, context).sample
    assert expected.std() > 0.05  # not the zeros of a new network
    torch.testing.assert_close(ours(x_t, t, context), expected, rtol=0, atol=1e-5)

    other = randomized(UNet(config))
    theirs.load_state_dict(other.state_dict())
    torch.testing.assert_close(theirs(x_t, t, context).sample, other(x_t, t, context), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
            "dual_cross_attention": False,
            "only_cross_attention": False,
            "num_class_embeds": None,
        },
    ],
    ids=["1.5", "2.1"],
)
def test_keys_and_shapes_equal_those_of_stable_diffusion(fields: dict[str, object]):
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**fields)  # type: ignore[arg-type]
        ours = UNet(from_diffusers(dict(theirs.config)))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) > 850e6


class RecordPrecision(TorchDispatchMode):
    """Record the types of products, and check the statistics of norms and the sums of softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self.checked: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("convolution", "addmm", "mm", "bmm"):
            self.products.add(args[0].dtype)
        elif name in ("native_group_norm", "native_layer_norm"):
            assert output[1].dtype == output[2].dtype == torch.float32
            self.checked.add(name)
        elif name == "_softmax":
            exact = args[0].double().softmax(args[1])
            # The result is rounded once: sums in half precision have several times this error.
            assert ((output - exact).abs() <= 1.01 * torch.finfo(output.dtype).eps / 2 * exact + 1e-7).all()
            self.checked.add(name)
        return output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.no_grad()
def test_weights_outputs_norms_and_softmax_stay_fp32_under_autocast(precision: str):
    unet = randomized(UNet(CONFIGS["attention at the first level"]))
    x_t, t, context = inputs(SMALL)
    expected = unet(x_t, t, context)
    with autocast(precision, x_t.device), RecordPrecision() as record:
        output = unet(x_t, t, context)
    assert record.products == {DTYPES[precision]}
    assert record.checked == {"native_group_norm", "native_layer_norm", "_softmax"}
    assert {output.dtype, *(weight.dtype for weight in unet.parameters())} == {torch.float32}
    assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_compile_without_a_compiler_is_a_user_error():
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"^compile: "),
    ):
        UNet(SMALL).compile()


@torch.no_grad()
def test_a_projected_context_replaces_the_context():
    unet = randomized(UNet(CONFIGS["heads by level, three levels"]))
    x_t, t, context = inputs(SMALL)
    assert torch.equal(unet(x_t, t, unet.project_context(context)), unet(x_t, t, context))


def test_every_parameter_gets_a_gradient():
    for config in CONFIGS.values():
        unet = randomized(UNet(config))
        unet(*inputs(config)).square().mean().backward()
        for name, weight in unet.named_parameters():
            assert weight.grad is not None, name
            # Group norm would cancel a bias that all channels of a group share; here groups have two or more channels.
            # A bias of keys would cancel, too; they have none.
            assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_a_new_network_returns_zero_and_start_as_copy_makes_it_return_its_input(config: UNetConfig):
    x_t, t, context = inputs(config)
    unet = UNet(config)
    assert unet(x_t, t, context).abs().max() == 0
    unet.start_as_copy()
    # The error is that of the norm's estimate of the standard deviation from some hundred values.
    assert (unet(x_t, t, context) - x_t).square().mean() < 0.02


@torch.no_grad()
def test_each_library_loads_the_folder_of_the_other(tmp_path: Path):
    ours = randomized(UNet(SMALL))
    assert isinstance(ours, UNet)
    ours.save_pretrained(tmp_path / "ours")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs(*inputs(SMALL)).sample, ours(*inputs(SMALL)), rtol=0, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    again = UNet.from_pretrained(tmp_path / "theirs")
    assert again.config == replace(SMALL, num_heads=(2, 2))
    assert torch.equal(again(*inputs(SMALL)), ours(*inputs(SMALL)))


def test_from_pretrained_supports_a_subfolder_and_a_dtype(tmp_path: Path):
    unet = randomized(UNet(SMALL))
    assert isinstance(unet, UNet)
    unet.save_pretrained(tmp_path / "unet")
    expected = UNet.from_pretrained(tmp_path / "unet").state_dict()
    found = UNet.from_pretrained(tmp_path, subfolder="unet", dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"]),
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("transformer_layers_per_block", 2),
        ("out_channels", 2),
        ("time_embedding_type", "fourier"),
        ("layers_per_block", [1, 2]),
        ("an_unknown_field", 1),
    ],
)
def test_an_unsupported_field_of_the_config_is_refused(field: str, value: object):
    theirs = {**dict(UNet2DConditionModel.from_config(to_diffusers(SMALL)).config), field: value}
    with pytest.raises(UserError, match=field):
        from_diffusers(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (16, 30)}, r"^unet\.channels: .*30.*unet\.num_groups.*8"),
        ({"num_heads": (2, 5)}, r"^unet\.channels: .*32.*unet\.num_heads.*5"),
        ({"attention": (True,)}, r"^unet\.attention: .*1.*2.*unet\.channels"),
        ({"num_heads": (1, 1, 1)}, r"^unet\.num_heads: .*3.*2.*unet\.channels"),
        ({"blocks_per_level": 0}, r"^unet\.blocks_per_level: 0"),
    ],
)
def test_an_inconsistent_config_is_refused(change: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


def test_a_damaged_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=rf"^{tmp_path} .*config\.json"):
        UNet.from_pretrained(tmp_path)
    UNet(SMALL).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"^{tmp_path}: "):
        UNet.from_pretrained(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 13}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*config\.json.*attn2"):
        UNet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path} .*diffusion_pytorch_model\.safetensors"):
        UNet.from_pretrained(tmp_path)
