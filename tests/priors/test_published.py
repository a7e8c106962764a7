"""Published checkpoints at their real size, by the names and shapes of their tensors.

tests/data/published.json.gz holds these facts: of each file the shape of each tensor, as the
authors' own code builds its network.
"""

import gzip
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ncvsd_inverse.checkpoints.parsed import Options, ParsedCheckpoint
from ncvsd_inverse.checkpoints.parsing import parse_checkpoint, recognise
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import ControlledDenoiser, Denoiser, UNetShape, constrain_weights_
from ncvsd_inverse.networks.adm import ADMUNet
from ncvsd_inverse.networks.library import ADMDenoiser, build_converted
from ncvsd_inverse.priors import load_prior
from ncvsd_inverse.priors.convert import convert, load_foreign
from ncvsd_inverse.training.presets import load_distill_config, load_teacher_config

PUBLISHED = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "data" / "published.json.gz").read_bytes())
)
# Of each file: layout, image shape, classes, sides at which blocks attend.
EXPECTED = {
    "edm-cifar10-32x32-cond-vp": ("EDM", (3, 32, 32), 10, [16]),
    "edm-ffhq-64x64-uncond-ve": ("EDM", (3, 64, 64), 0, [16]),
    "edm-ffhq-64x64-uncond-vp": ("EDM", (3, 64, 64), 0, [16]),
    "edm2-ffhq256-xs": ("EDM2", (3, 256, 256), 0, []),
    "edm2-img512-xs": ("EDM2", (4, 64, 64), 1000, [16, 8]),
    "edm2-img64-s": ("EDM2", (3, 64, 64), 1000, [16, 8]),
    "ffhq_10m": ("ADM", (3, 256, 256), 0, [16]),
    "ncvsd-ffhq256-xs": ("NCVSD", (3, 256, 256), 0, []),
}


def hollow(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(network):
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def test_every_published_file_has_its_row():
    assert PUBLISHED.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_published_names_and_shapes(name):
    found = recognise(hollow(PUBLISHED[name]), None, Options())
    network = build_converted(found.config, "meta")
    came = {key.removeprefix("network."): shape for key, shape in shapes_of(network).items()}
    # The times of an ADM network are none of its own tensors.
    assert ("log_sigmas" in came) == (name == "ffhq_10m")
    came.pop("log_sigmas", None)
    assert came == {key.removeprefix("model."): shape for key, shape in PUBLISHED[name].items()}
    assert found.tensors.keys() == network.state_dict().keys()
    layout, image_shape, classes, attention = EXPECTED[name]
    assert (found.layout, found.image_shape) == (layout, image_shape)
    assert network.num_classes == classes
    told = found.config.get("arguments", found.config)
    assert list(told.get("attention", told.get("attn_resolutions"))) == attention
    if layout in ("EDM2", "NCVSD"):
        assert network.shape.bottleneck_attention


def test_the_presets_have_the_networks_of_the_published_files():
    for name, config in [
        ("ncvsd-ffhq256-xs", load_distill_config("ffhq256_xs")),
        ("edm2-ffhq256-xs", load_teacher_config("ffhq256_xs")),
        ("edm2-img64-s", load_teacher_config("imagenet64_s")),
    ]:
        found = recognise(hollow(PUBLISHED[name]), None, Options())
        assert build_converted(found.config, "meta").shape == config.network


# Channels of the finest level and millions of parameters: Karras et al., arXiv 2312.02696.
@pytest.mark.parametrize(
    ("size", "channels", "millions"),
    [
        ("xs", 128, 125),
        ("s", 192, 280),
        ("m", 256, 498),
        ("l", 320, 778),
        ("xl", 384, 1119),
        ("xxl", 448, 1523),
    ],
)
def test_sizes_of_edm2(size, channels, millions):
    levels = tuple(channels * mult for mult in (1, 2, 3, 4))
    shape = UNetShape(64, image_channels=4, channels=levels, num_classes=1000)
    with torch.device("meta"):
        network = Denoiser(shape)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)
    found = recognise(network.state_dict(), None, Options())
    assert build_converted(found.config, "meta").shape == shape


def adm_arguments(**changes):
    return {
        "resolution": 64,
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": 192,
        "channels": [192, 384, 576, 768],
        "blocks": 3,
        "attention": [32, 16, 8],
        "heads": ["head_channels", 64],
        "attention_order": "legacy",
        "block_resampling": True,
        "scale_shift": True,
        "num_classes": 1000,
        **changes,
    }


WIDE = {"model_channels": 256, "blocks": 2}


# Millions of parameters of the networks with classes: Dhariwal & Nichol, arXiv 2105.05233.
@pytest.mark.parametrize(
    ("changes", "told", "millions"),
    [
        ({"attention_order": "new"}, {"attention_order": "new"}, 296),
        (
            {
                **WIDE,
                "resolution": 128,
                "channels": [256, 256, 512, 768, 1024],
                "heads": ["num_heads", 4],
            },
            {"num_heads": 4},
            422,
        ),
        ({**WIDE, "resolution": 256, "channels": [256, 256, 512, 512, 1024, 1024]}, {}, 554),
        ({**WIDE, "resolution": 512, "channels": [128, 256, 256, 512, 512, 1024, 1024]}, {}, 559),
        ({"out_channels": 3, "num_classes": 0}, {}, None),
        ({"block_resampling": False, "scale_shift": False, "attention": []}, {}, None),
        (
            {"channels": [192, 384], "attention": [32], "heads": ["head_channels", 32]},
            {"size": 64},
            None,
        ),
    ],
)
def test_networks_of_adm(changes, told, millions):
    arguments = adm_arguments(**changes)
    with torch.device("meta"):
        network = ADMUNet(**arguments)
    if millions:
        count = sum(p.numel() for p in network.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.6)
    told = dict(told)
    if arguments["heads"] == ["head_channels", 32]:
        told["head_channels"] = 32
    found = recognise(network.state_dict(), None, Options(**told))
    assert found.config["arguments"] == arguments
    assert found.image_shape == (3, arguments["resolution"], arguments["resolution"])


SMALL = {"model_channels": 32, "channels": [32, 64], "blocks": 1, "attention": [32]}


def small_adm(**changes):
    torch.manual_seed(0)
    network = ADMUNet(**adm_arguments(**{**SMALL, "num_classes": 5, **changes}))
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("resampling", [True, False])
def test_adm_with_classes(tmp_path, resampling):
    network = small_adm(out_channels=3, block_resampling=resampling)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "adm.pt")
    card = convert(tmp_path / "adm.pt", tmp_path / "adm", schedule="cosine", size=64, check=False)
    assert card.training["schedule"] == "cosine, as given"
    prior = load_prior(tmp_path / "adm")
    x, time = torch.randn(2, 3, 64, 64), 400
    with pytest.raises(ValueError, match="needs a class"):
        prior.denoise(x, 1.0)
    # The cosine schedule of arXiv 2102.09672 is this function of time, but for its last times.
    alpha = math.cos((time + 1 + 8) / 1008 * math.pi / 2) ** 2
    alpha /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    sigma = math.sqrt((1 - alpha) / alpha)
    outputs = []
    for label in (4, 0):
        eps = network(math.sqrt(alpha) * x, torch.tensor([time] * 2), torch.tensor([label] * 2))
        outputs.append(prior.conditioned_on(label).denoise(x, sigma))
        assert torch.allclose(outputs[-1], x - sigma * eps, atol=2e-4)
    assert not torch.allclose(*outputs, atol=1e-2)


@torch.no_grad()
def test_heads_and_the_order_of_attention(tmp_path):
    network = small_adm(num_classes=0, heads=["num_heads", 2])
    x, time = torch.randn(1, 3, 64, 64), torch.tensor([300.0])
    expected = network(x, time)
    legacy, new = dict(network.state_dict()), {}
    for name, value in legacy.items():
        if ".qkv." in name:  # (head, q k v, channel) to (q k v, head, channel)
            value = value.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2)
        new[name] = value
    for state, told, same in [
        (legacy, {"num_heads": 2}, True),
        (legacy, {"head_channels": 32}, True),
        (legacy, {"head_channels": 64}, False),
        (legacy, {"num_heads": 2, "attention_order": "new"}, False),
        (new, {"num_heads": 2, "attention_order": "new"}, True),
    ]:
        torch.save(state, tmp_path / "adm.pt")
        convert(tmp_path / "adm.pt", tmp_path / "adm", size=64, check=False, **told)
        out = load_prior(tmp_path / "adm").network.network(x, time)
        assert torch.allclose(out, expected, atol=1e-5) == same, told


def test_odd_networks_of_adm_are_named(tmp_path):
    state = small_adm().state_dict()
    path = tmp_path / "adm.pt"
    wide = {**state, "input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}
    for content, told, match in [
        (state, {}, r"size must be given, a multiple of 2, for a network of 2 levels, got None"),
        (state, {"size": 63}, "size must be given, a multiple of 2"),
        (state, {"size": 64, "head_channels": 48}, "head_channels must divide 64 channels, got 48"),
        (wide, {"size": 64}, "image's channels, once or with a variance twice, got 6 for 6"),
        ({k: v for k, v in state.items() if k != "out.2.weight"}, {}, r"lacks a layer.*out\.2"),
        ({k: v for k, v in state.items() if "output_blocks.3" not in k}, {}, "share its output"),
        ({**state, "label_emb.bias": torch.zeros(1)}, {"size": 64}, r"unexpected: .*label_emb\.b"),
    ]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=match):
            convert(path, tmp_path / "adm", check=False, **told)
    for told, match in [
        ({"head_channels": 32, "num_heads": 2}, "must not be given together"),
        ({"schedule": "quadratic"}, "schedule must be one of"),
        ({"num_heads": 0}, "num_heads must be"),
    ]:
        with pytest.raises(ValueError, match=match):
            convert(path, tmp_path / "adm", **told)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adm.pt"]


TINY = UNetShape(32, channels=(16, 32), blocks=1, attention=(16,), head_channels=16)
WHOLE_HEADS = UNetShape(32, channels=(16, 96), blocks=1, attention=(16,))


def tiny(path, shape=TINY, *, gain=0.0, kind=Denoiser):
    """Write a network that returns c_skip x, or adds a mess to it."""
    torch.manual_seed(0)
    network = kind(shape)
    constrain_weights_(network)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "out_gain" in name:
                value.fill_(gain)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_conversion_is_checked(tmp_path, monkeypatch, channels):
    teacher, own = load_prior("ncvsd_natural_teacher").network, Denoiser.forward

    def ideal(self, x, sigma, labels=None):
        return own(teacher, x.expand(-1, 3, -1, -1), sigma)[:, : x.shape[1]]

    monkeypatch.setattr(Denoiser, "forward", ideal)
    shape = UNetShape(**{**asdict(TINY), "image_channels": channels})
    card = convert(tiny(tmp_path / "a.pt", shape), tmp_path / "a", head_channels=16)
    told = json.loads((tmp_path / "a.json").read_text())["training"]["self_check"]
    assert told == card.training["self_check"]
    if channels == 4:
        assert told == "not possible: images of 4 channels are no pictures"
        return
    assert [row["sigma"] for row in told] == [0.1, 0.5, 2.0]
    for row in told:
        assert row["noisy"] == pytest.approx(row["sigma"] ** 2, rel=0.1)
        assert 0 < row["denoised"] < row["noisy"]
    assert told[0]["denoised"] < told[0]["scaled"] < told[0]["noisy"]


@pytest.mark.parametrize("gain", [0.0, 1.5])
@pytest.mark.parametrize("kind", [Denoiser, ControlledDenoiser])
def test_what_does_not_denoise_is_not_written(tmp_path, kind, gain):
    path = tiny(tmp_path / "a.pt", gain=gain, kind=kind)
    with pytest.raises(
        CheckpointError, match="head_channels must make heads that divide 32 channels, got 64"
    ):
        convert(path, tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "a", head_channels=16)
    message = str(caught.value)
    for part in ("does not denoise", "may be head_channels", "0.01 to ", "--no-check"):
        assert part in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]
    convert(path, tmp_path / "a", head_channels=16, check=False)


@pytest.mark.parametrize("trained", ["linear", "cosine"])
def test_the_schedule_is_found_by_trying(tmp_path, monkeypatch, trained):
    torch.save(small_adm(num_classes=0).state_dict(), tmp_path / "adm.pt")
    teacher = load_prior("ncvsd_faces64_teacher", dtype=torch.float32)
    told = {"size": 64, "schedule": trained}
    found = parse_checkpoint(tmp_path / "adm.pt", Options(**told))
    right = found.tensors["log_sigmas"].clone()

    class Ideal(ADMDenoiser):
        """Predicts what a network that was trained with `right` would."""

        def predict(self, x, time, labels):
            sigma = float(right[round(float(time))].exp())
            u = x * math.sqrt(1 + sigma**2)
            return (u - teacher.denoise(u, min(sigma, 80.0))) / sigma

    def filled(found, device, dtype):
        network = Ideal(found.config["arguments"])
        network.log_sigmas.copy_(found.tensors["log_sigmas"])
        return network.to_inference(dtype)

    monkeypatch.setattr(ParsedCheckpoint, "build", filled)
    card = convert(tmp_path / "adm.pt", tmp_path / "found", size=64)
    assert card.training["schedule"] == f"{trained}, by the self-check"
    assert (card.sigma_min, card.sigma_max) == (found.sigma_min, found.sigma_max)
    card = convert(tmp_path / "adm.pt", tmp_path / "given", **told)
    assert card.training["schedule"] == f"{trained}, as given"
    wrong = "linear" if trained == "cosine" else "cosine"
    with pytest.raises(CheckpointError, match=f"better with schedule '{trained}'.*'{wrong}'"):
        convert(tmp_path / "adm.pt", tmp_path / "wrong", size=64, schedule=wrong)
    assert not list(tmp_path.glob("*wrong*"))


def test_options_that_a_layout_does_not_have(tmp_path):
    path = tiny(tmp_path / "a.pt")
    for told, match in [
        ({"schedule": "cosine"}, "schedule must not be given for EDM2, got 'cosine'"),
        ({"num_heads": 4}, "num_heads must not be given for EDM2"),
        ({"size": 64, "head_channels": 16}, "size is 32 by its tensors, got 64"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            convert(path, tmp_path / "a", **told)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (
            ["unet.enc.8x8_conv.weight", "unet.out_gain", *(f"other.{i}" for i in range(13))],
            r"nearest known layout is EDM2, where these do not fit: "
            r"(other\.\d+, ){9}other\.9 and 3 more$",
        ),
        (["output_blocks.0.0.bias", "x"], "nearest known layout is ADM, where .* fit: x$"),
        (["dec.8x8_in0.qkv.weight", "x"], "nearest known layout is EDM, where .* fit: x$"),
        (["enc.enc.8x8_conv.weight", "x"], "nearest known layout is NCVSD, where .* fit: x$"),
        (["middle_block.0.bias"], "nearest known layout is ADM, whose first layers it lacks"),
        (["conv_in.weight", "x"], "nearest known layout is diffusers, which are read as folders"),
        (["x"], "of no known network: x; not one has a name of the known layouts, EDM2, NCVSD"),
    ],
)
def test_an_unknown_layout_is_compared_with_the_known_ones(tmp_path, names, match):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=match):
        load_foreign(tmp_path / "a.pt")


def test_the_average_is_taken_where_a_file_holds_both(tmp_path):
    plain, average = (Denoiser(WHOLE_HEADS).state_dict() for _ in range(2))
    average["unet.out_gain"] = torch.tensor(0.25)
    torch.save({"model": plain, "model_ema": average, "step": 3}, tmp_path / "a.pt")
    assert float(load_foreign(tmp_path / "a.pt").network.unet.out_gain) == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_stores_what_folding_gives(tmp_path, dtype):
    path = tiny(tmp_path / "a.pt", WHOLE_HEADS, gain=1.0, kind=ControlledDenoiser)
    expected = ControlledDenoiser(WHOLE_HEADS)
    expected.load_state_dict(torch.load(path, weights_only=True))
    constrain_weights_(expected)
    expected.to_inference(dtype)
    network = load_foreign(path, dtype=dtype).network
    assert network.compute_dtype == dtype
    for name, value in expected.state_dict().items():
        came = network.state_dict()[name]
        assert came.equal(value), name
        assert (came.dtype, came.stride()) == (value.dtype, value.stride()), name
