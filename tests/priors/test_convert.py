"""Converted checkpoints give the numbers of the networks that they were made of."""

import hashlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from fuzz_unpickle import hostile_opcodes, persistent_pickle
from ncvsd_inverse.checkpoints.parsed import ParsedCheckpoint
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ControlledDenoiser,
    Denoiser,
    UNetShape,
    constrain_weights_,
)
from ncvsd_inverse.networks.library import LIBRARY, build_converted
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior, load_prior
from ncvsd_inverse.priors.convert import convert, load_foreign
from ncvsd_inverse.priors.registry import load_network

RTOL = 1e-4  # the published code and ours order float32 sums differently
SHAPE = {"resolution": 32, "channels": (16, 32), "blocks": 1, "attention": (16,)}
SIGMAS = torch.tensor([0.05, 0.7, 20.0])


class Part(nn.Module):
    """A module of whatever tensors and attributes, for the layouts of others."""

    def __init__(self, state, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        inner = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(first, nn.Parameter(value, requires_grad=False))
        for name, entries in inner.items():
            self.add_module(name, Part(entries))
        if "attn_proj" in inner:
            self.num_heads = inner["attn_proj"]["weight"].shape[0] // 16


class EDMPrecond(Part):
    pass


class VPPrecond(Part):
    pass


def nvidia(path, state, kind=Part, **attributes):
    """Write a pickle as NVIDIA's training does, with source that would fail if it ran."""
    content = {"ema": kind(state, **attributes), "dataset_kwargs": {"resolution": 32}}
    path.write_bytes(persistent_pickle(content, source="raise SystemExit('ran')"))
    return path


def randomised(network, scale=0.05):
    """Give every tensor that training would change random values; others stay."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(scale * torch.randn_like(value))
    return network.eval()


def images(channels=3, side=32):
    torch.manual_seed(1)
    x0 = torch.rand(len(SIGMAS), channels, side, side) * 2 - 1
    return x0 + SIGMAS.view(-1, 1, 1, 1) * torch.randn_like(x0)


def close(ours, theirs, rtol=RTOL):
    return ours.shape == theirs.shape and float((ours - theirs).norm() / theirs.norm()) < rtol


@torch.no_grad()
@pytest.mark.parametrize("variant", ["unlabelled", "labelled"])
def test_published_networks(parity_folder, tmp_path, variant):
    weights = load_file(parity_folder / f"weights_{variant}.safetensors")
    values = load_file(parity_folder / f"values_{variant}.safetensors")

    def part(prefix, new=""):
        named = weights.items()
        return {new + k.removeprefix(prefix): v for k, v in named if k.startswith(prefix)}

    labels = values.get("labels")
    teacher = load_foreign(nvidia(tmp_path / "teacher.pkl", part("teacher.")), dtype=torch.float32)
    assert isinstance(teacher, DiffusionPrior)
    output = teacher.network(values["x"], values["sigma"], labels)
    assert close(output, values["teacher_output"])
    path = nvidia(tmp_path / "student.pkl", part("conditional.", "model."))
    student = load_foreign(path, dtype=torch.float32)
    assert isinstance(student, NCVSDPrior)
    assert student.gamma == 0.414
    views = [values[k] for k in ("x", "sigma", "condition", "condition_sigma")]
    assert close(student.network(*views, labels), values["conditional_output"])


@torch.no_grad()
@pytest.mark.parametrize("kind", [Denoiser, ControlledDenoiser, ConcatDenoiser])
@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("source", ["pickle", "state dict", "safetensors"])
def test_networks_of_ours(tmp_path, kind, num_classes, source):
    # Heads of other widths can only be told by the pickled modules.
    head_channels = 16 if source == "pickle" else 64
    shape = UNetShape(
        **{**SHAPE, "channels": (16, 64)}, num_classes=num_classes, head_channels=head_channels
    )
    network = randomised(kind(shape, sigma_data=0.5))
    for name, value in network.state_dict().items():
        if name.endswith("gain"):
            value.fill_(0.8)
        if "additional" in name or "condition_weight" in name:
            value.fill_(0.3)
        if "additional_skips" in name:
            value[:2] = torch.tensor([-0.2, 1.4])  # outside [0, 1], where they are clipped
    state = {name: value.half() for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    constrain_weights_(network)
    path = tmp_path / ("file.safetensors" if source == "safetensors" else "file.pkl")
    if source == "pickle":
        nvidia(path, state, gamma=0.3)
    elif source == "state dict":
        torch.save({"net": {f"module.{k}": v for k, v in state.items()}, "step": 3}, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    card = convert(path, tmp_path / "converted", check=False)
    assert card.training == {
        "self_check": "not wanted",
        "converted_from": path.name,
        "layout": "EDM2" if kind is Denoiser else "NCVSD",
        "dtype": "float16",
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert card.image_shape == (3, 32, 32)
    x = images()
    views = [x, SIGMAS] if kind is Denoiser else [x, SIGMAS, x.flip(3), SIGMAS.flip(0)]
    expected = network(*views)
    for prior in (
        load_prior(tmp_path / "converted", dtype=torch.float32),
        load_foreign(path, dtype=torch.float32),
    ):
        assert close(prior.network(*views), expected, 1e-6)
        assert prior.image_shape == (3, 32, 32)
        assert (prior.sigma_min, prior.sigma_max) == (0.002, 80.0)
        if kind is not Denoiser:
            assert prior.gamma == (0.3 if source == "pickle" else 0.414)
        if num_classes:
            prior.conditioned_on(9)
    with pytest.raises(ValueError, match="number of classes"):
        prior.conditioned_on(num_classes)


def make_edm(model_type, label_dim=0):
    from deepinv.models import NCSNpp

    return randomised(
        NCSNpp(
            model_type,
            img_resolution=16,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(8,),
            label_dim=label_dim,
            pretrained=None,
            pixel_std=0.5,
        )
    )


def through_card(src, folder):
    """Convert `src`; return the denoiser that the written files give, whole, and its card."""
    card = convert(src, folder / "converted.safetensors", check=False)
    assert json.loads((folder / "converted.json").read_text())["sha256"] == card.sha256
    denoiser = build_converted(json.loads(json.dumps(card.network)), "cpu")
    denoiser.load_state_dict(load_file(folder / "converted.safetensors"))
    denoiser = denoiser.to_inference(torch.bfloat16)
    assert not denoiser.training
    assert not any(value.requires_grad for value in denoiser.parameters())
    return denoiser, card


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["ddpm", "ncsn"])
@pytest.mark.parametrize("label_dim", [0, 10])
def test_edm(tmp_path, model_type, label_dim):
    network = make_edm(model_type, label_dim)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    path = nvidia(tmp_path / "edm.pkl", state, EDMPrecond, sigma_data=0.5)
    denoiser, card = through_card(path, tmp_path)
    prior = load_foreign(path)
    assert card.image_shape == prior.image_shape == (3, 16, 16)
    x, labels = images(side=16), torch.eye(10)[:3] if label_dim else None
    given = labels if labels is not None else torch.zeros(3, 1)
    # EDM's preconditioning, table 1.
    level = SIGMAS.view(-1, 1, 1, 1)
    total = level**2 + 0.25
    raw = network.forward_unet(x / total.sqrt(), SIGMAS.log() / 4, class_labels=given)
    expected = 0.25 / total * x + level * 0.5 / total.sqrt() * raw
    for ours in (denoiser, prior.network):
        assert close(ours(x, SIGMAS, labels), expected, 1e-5)
        assert ours(x.double(), SIGMAS.double(), labels).dtype == torch.float64
    if label_dim:
        unlabelled = network(x, SIGMAS, torch.zeros(3, 10), input_in_minus_one_one=True)
        assert close(prior.denoise(x, SIGMAS), unlabelled, 1e-5)
        assert not close(unlabelled, expected, 1e-3)
    assert prior.with_steps(2).sample(x, SIGMAS).shape == x.shape


def write_diffusers(folder, prediction="epsilon", layout="pipeline", **options):
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        # With one channel a group, times and classes would have no effect.
        "norm_num_groups": 8,
    }
    network = randomised(UNet2DModel(**{**config, **options}))
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction, clip_sample=False
    )
    network.save_pretrained(folder / "unet" if layout == "pipeline" else folder)
    scheduler.save_pretrained(folder / "scheduler" if layout == "pipeline" else folder)
    return network, scheduler


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("layout", ["pipeline", "flat"])
def test_diffusers(tmp_path, prediction, layout):
    network, scheduler = write_diffusers(tmp_path, prediction, layout)
    denoiser, card = through_card(tmp_path, tmp_path)
    prior = load_foreign(tmp_path / "unet" if layout == "pipeline" else tmp_path)
    assert card.image_shape == prior.image_shape == (3, 16, 16)
    noisy = images(side=16)
    for time in (0, 1, 437, 998, 999):
        alpha = scheduler.alphas_cumprod[time].double()
        sigma = ((1 - alpha) / alpha).sqrt().float()
        x = noisy if time < 900 else noisy + sigma * torch.randn_like(noisy)
        scaled = alpha.sqrt().float() * x
        out = network(scaled, time).sample
        expected = scheduler.step(out, time, scaled).pred_original_sample
        for ours in (denoiser, prior.network):
            # Far out a prediction of noise is the small difference of large numbers.
            assert close(ours(x, sigma.expand(3)), expected, 1e-3 if time > 900 else RTOL)
    assert prior.sigma_min == pytest.approx(card.sigma_min)
    assert prior.sigma_max > 1000
    assert denoiser.time(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]
    low, high = denoiser.log_sigmas[[437, 438]]
    middle = ((low + high) / 2).exp().reshape(1)
    assert denoiser.time(middle).item() == pytest.approx(437.5, abs=0.01)


@torch.no_grad()
def test_load_prior_takes_foreign_files_and_what_they_are_converted_to(tmp_path, monkeypatch):
    network = make_edm("ddpm")
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    path = nvidia(tmp_path / "edm.pkl", state, EDMPrecond, sigma_data=0.5)
    monkeypatch.chdir(tmp_path)
    direct, bare = load_prior(path), load_prior("edm.pkl")
    convert(path, tmp_path / "converted", check=False)
    converted = load_prior(tmp_path / "converted")
    x = images(side=16)
    expected = direct.denoise(x, SIGMAS)
    for prior in (bare, converted):
        assert prior.denoise(x, SIGMAS).equal(expected)
    assert converted.card.name == "converted"
    with pytest.raises(CheckpointError, match="another library, which does not train"):
        load_network(tmp_path / "converted")


@torch.no_grad()
def test_diffusers_with_classes_and_learned_variance(tmp_path):
    network, scheduler = write_diffusers(tmp_path, num_class_embeds=5, out_channels=6)
    prior = load_foreign(tmp_path)
    x = images(side=16)
    with pytest.raises(ValueError, match="needs a class"):
        prior.denoise(x, 1.0)
    alpha = scheduler.alphas_cumprod[500]
    sigma = ((1 - alpha) / alpha).sqrt()
    eps = network(alpha.sqrt() * x, 500, class_labels=torch.tensor([4, 4, 4])).sample[:, :3]
    told = [(x - prior.conditioned_on(k).denoise(x, float(sigma))) / sigma for k in (4, 0)]
    assert close(told[0], eps)
    assert not close(told[1], eps, 1e-2)


@torch.no_grad()
def test_diffusers_of_early_versions(tmp_path):
    network, _ = write_diffusers(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in network.state_dict().items():
        for new, early in old.items():
            name = name.replace(f".{new}.", f".{early}.")
        state[name] = value
    assert state.keys() != network.state_dict().keys()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    converted = load_foreign(tmp_path).network.network.state_dict()
    assert all(torch.equal(value, converted[name]) for name, value in network.state_dict().items())


@pytest.fixture(scope="module")
def adm():
    from deepinv.models import DiffUNet

    return randomised(DiffUNet(pretrained=None), 0.01)


def adm_state(network):
    tables = ("sqrt_1m_alphas_cumprod", "sqrt_alphas_cumprod")
    return {name: value for name, value in network.state_dict().items() if name not in tables}


@pytest.mark.slow
@torch.no_grad()
def test_adm(tmp_path, adm):
    torch.save(adm_state(adm), tmp_path / "ffhq_10m.pt")
    denoiser, card = through_card(tmp_path / "ffhq_10m.pt", tmp_path)
    assert card.image_shape == (3, 256, 256)
    assert card.sigma_min == pytest.approx(0.01, rel=1e-3)
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    x = images()
    for time in (3, 300, 700):
        sigma = ((1 - alphas[time]) / alphas[time]).sqrt().float()
        ours = denoiser(x, sigma.expand(3))
        eps = adm.forward_diffusion(alphas[time].sqrt().float() * x, torch.tensor([time] * 3))
        assert eps.shape[1] == 6
        assert close(ours, x - sigma * eps[:, :3])
        # The library's own denoiser, for images in [0, 1], which clips.
        theirs = adm((x + 1) / 2, sigma / 2) * 2 - 1
        assert close(ours.clamp(-1, 1), theirs)


def test_what_does_not_fit_is_listed_up_to_ten(tmp_path):
    state = {**teacher_state(), **{f"unet.dec.more{i:02d}": torch.zeros(1) for i in range(12)}}
    with pytest.raises(
        CheckpointError, match=r"unexpected: (\S+, ){9}unet\.dec\.more09 and 2 more$"
    ):
        convert(nvidia(tmp_path / "teacher.pkl", state), tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pkl"]


def teacher_state(**options):
    return randomised(Denoiser(UNetShape(**{**SHAPE, **options}, head_channels=16))).state_dict()


def test_every_odd_key_is_listed(tmp_path):
    state = teacher_state()
    state["unet.dec.more.weight"] = torch.zeros(2)
    state["unet.out_gain"] = torch.zeros(2)
    state["logvar_fourier.freqs"] = torch.zeros(128, dtype=torch.int64)
    del state["unet.enc.32x32_block0.conv_res1.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_foreign(nvidia(tmp_path / "teacher.pkl", state))
    assert str(caught.value).endswith(
        "its tensors are not those of its network; "
        "missing: unet.enc.32x32_block0.conv_res1.weight; "
        "unexpected: unet.dec.more.weight; "
        "of another shape: unet.out_gain (2,) for (); "
        "not of floating point: logvar_fourier.freqs"
    )


@pytest.mark.parametrize("kind", ["ours", "edm"])
def test_tensors_of_odd_shapes_are_refused(tmp_path, kind):
    if kind == "ours":
        state = teacher_state(num_classes=10)
    else:
        state = {f"model.{n}": v for n, v in make_edm("ncsn", 10).state_dict().items()}
    telling = [n for n in state if re.search(r"_conv\.|block0\.|emb_|map_|attn_proj|out_", n)]
    assert len(telling) > 20
    for name in random.Random(0).sample(telling, 6):
        for odd in (torch.zeros(3, 3, 3), torch.zeros(0, 0), torch.zeros(1, 1, 1, 1, 1)):
            path = nvidia(tmp_path / "file.pkl", {**state, name: odd}, EDMPrecond)
            with pytest.raises(CheckpointError, match="cannot be converted"):
                load_foreign(path)


def test_what_would_give_other_numbers_is_refused(tmp_path):
    state, path = teacher_state(), tmp_path / "file.pkl"
    edm = {f"model.{name}": value for name, value in make_edm("ddpm").state_dict().items()}
    narrow = {
        name: value[..., :64] if name == "model.map_layer0.weight" else value
        for name, value in edm.items()
    }
    conv = "model.enc.16x16_conv.weight"
    for content, options, match in [
        (state, {"clip_act": 128}, r"clip_act must be 256\.0, got 128"),
        (state, {"label_balance": 0.4}, "label_balance must be 0.5"),
        (state, {"sigma_data": "much"}, "sigma_data must be a number, got 'much'"),
        (edm, {"kind": VPPrecond}, "preconditioning must be EDM's, got VPPrecond"),
        ({**edm, "model.out_conv.weight": torch.zeros(1)}, {"kind": EDMPrecond}, "variant of ADM"),
        (
            {**edm, conv: edm[conv][:64]},
            {"kind": EDMPrecond},
            r"multiples of|at least 128 channels",
        ),
        (narrow, {"kind": EDMPrecond}, r"of another shape: network\.map_layer0\.weight"),
        ({"weight": torch.zeros(1)}, {}, "of no known network: weight"),
        ({"unet.emb_noise.weight": torch.zeros(1)}, {}, "encoder lacks a layer"),
        ({"map_layer0.weight": torch.zeros(1)}, {"kind": EDMPrecond}, "encoder lacks a layer"),
        ({"input_blocks.0.0.weight": torch.zeros(1)}, {}, "cannot be converted"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            load_foreign(nvidia(path, content, **options))
    state["unet.out_conv.weight"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"unet\.out_conv\.weight must be finite"):
        convert(nvidia(path, state), tmp_path / "converted")
    for value, match in [
        ({"ema": 3}, "tensors only, got others: ema"),
        ([1], "must hold a network or a state dict, got a list"),
        ({}, "must hold a network"),
    ]:
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(CheckpointError, match=match):
            load_foreign(path)
    (tmp_path / "file.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"file\.safetensors cannot be converted"):
        load_foreign(tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="existing folder"):
        convert(path, tmp_path / "absent" / "name")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file.pkl", "file.safetensors"}


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "must be a UNet2DModel"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "embedded by position"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "embedded by index"),
        ("unet/config.json", {"sample_size": [16, 32]}, "squares of known size"),
        ("unet/config.json", {"surprise": 1}, "cannot be built"),
        ("unet/config.json", {"act_fn": "os.system"}, "cannot be built"),
        ("unet/config.json", {"layers_per_block": 2}, "missing: network"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block must be"),
        ("unet/config.json", {"padding": " " * (1 << 20)}, "at most 1048576 bytes"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "must be an integer"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type must"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "other"}, "cannot be built"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "pure noise"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0, "beta_schedule": "linear"}, "grow"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.5, 1.0]}, "never drown"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.0, 0.1]}, "grow from time"),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json must be there"),
    ],
)
def test_folders_of_diffusers_that_are_odd(tmp_path, file, changes, match):
    write_diffusers(tmp_path)
    path = tmp_path / file
    entries = json.loads(path.read_text())
    if changes is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**entries, **changes}))
    with pytest.raises(CheckpointError, match=match):
        load_foreign(tmp_path)


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "subprocess.Popen", "torch.load"])
def test_hostile_files_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = b"\x80\x04" + hostile_opcodes("ran")[name] + b"."
    write_diffusers(tmp_path / "folder")
    weights = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(content)
    (tmp_path / "file.pt").write_bytes(content)
    for path in ("file.pt", "folder"):
        with pytest.raises(CheckpointError, match=f"asks for {name}, which is refused"):
            convert(path, "converted")
    assert {path.name for path in tmp_path.iterdir()} == {"file.pt", "folder"}


def test_kinds_are_a_fixed_table():
    for kind in ("os.system", "DiffUNet", None, ["edm"]):
        with pytest.raises(ValueError, match="kind must be one of"):
            build_converted({"kind": kind}, "meta")
    for kind in LIBRARY:
        with pytest.raises(ValueError, match="cannot be built"):
            build_converted({"kind": kind, "surprise": 1}, "meta")


def test_dtypes_are_read_from_the_file():
    values = {"a": torch.zeros(1).half(), "b": torch.zeros(1)}
    found = ParsedCheckpoint(layout="x", config={}, tensors=values, image_shape=(1, 1, 1))
    assert found.dtype == "float16, float32"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's ru_maxrss")
@pytest.mark.parametrize("layout", ["nvidia", "zip"])
def test_memory(tmp_path, layout):
    root = Path(__file__).parents[2]
    command = [sys.executable, "experiments/security/convert_memory.py", "--megabytes", "100"]
    run = subprocess.run(
        [*command, "--layout", layout],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    ratio = float(run.stdout.split("peak / file:")[1].split()[0])
    assert 0.2 < ratio < 1.5, run.stdout
