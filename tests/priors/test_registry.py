"""Saving and loading priors: round trips, every kind of damage, names, handles."""

import copy
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import ConcatDenoiser, ConcatDiscriminator, Denoiser
from ncvsd_inverse.networks.library import build_converted
from ncvsd_inverse.priors import (
    DiffusionPrior,
    GaussianMixturePrior,
    GaussianPrior,
    LatentPrior,
    NCVSDPrior,
    PriorCard,
    PriorHandle,
    describe_prior,
    list_priors,
    load_card,
    load_prior,
    registry,
    save_prior,
)
from ncvsd_inverse.priors.files import TensorFile, write_tensors
from ncvsd_inverse.priors.registry import load_network
from ncvsd_inverse.priors.tiled import tiled
from ncvsd_inverse.protocols import Point, PriorTraits
from tests.priors.tiny import CARD, SHAPE, make_network, use_folders


@pytest.fixture
def no_other_priors(tmp_path, monkeypatch):
    """Look for names in an empty package, an empty cache and a folder $NCVSD_WEIGHTS."""
    use_folders(monkeypatch, tmp_path, tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved(tmp_path, no_other_priors):
    save_prior(tmp_path / "tiny", make_network(), CARD)
    return tmp_path / "tiny"


def rewrite_card(stem, **changes):
    path = Path(f"{stem}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_weights(stem, state):
    """Store other weights and their true hash."""
    weights = safetensors.torch.save(state)
    Path(f"{stem}.safetensors").write_bytes(weights)
    rewrite_card(stem, sha256=hashlib.sha256(weights).hexdigest())


def test_round_trip(saved):
    prior = load_prior(saved, dtype=torch.float32)
    assert isinstance(prior, NCVSDPrior)
    assert prior.image_shape == (3, 8, 8)
    assert (prior.gamma, prior.sigma_min, prior.sigma_max) == (0.3, 0.004, 40.0)
    assert prior.card == load_card(saved)
    assert prior.card.training == {"command": "none", "steps": 0}
    u, sigma = torch.rand(2, 3, 8, 8), torch.tensor([0.1, 2.0])
    expected = make_network()(u, 1.3 * sigma, u, sigma)
    torch.testing.assert_close(prior.network(u, 1.3 * sigma, u, sigma), expected)
    assert not expected.allclose(u, atol=0.1)
    assert not any(parameter.requires_grad for parameter in prior.network.parameters())
    assert prior.generate(2, num_steps=1).shape == (2, 3, 8, 8)


def test_every_way_to_name_a_path(saved, monkeypatch):
    monkeypatch.setenv("NCVSD_WEIGHTS", "")
    for path in (saved, str(saved), f"{saved}.json", Path(f"{saved}.safetensors"), "tiny.json"):
        assert load_prior(path).card.name == "tiny"


def test_computes_in_the_dtype_asked_for(saved):
    u = torch.rand(1, 3, 8, 8)
    arguments = (u, torch.ones(1), u, torch.ones(1))
    exact = load_prior(saved, dtype=torch.float32).network(*arguments)
    coarse = load_prior(saved, device="cpu", dtype=torch.bfloat16).network(*arguments)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    torch.testing.assert_close(coarse, exact, rtol=0, atol=0.05)
    assert load_prior(saved).sample(u, 1.0).dtype == torch.float32
    for dtype in (torch.int32, "float32"):
        with pytest.raises(TypeError, match="dtype must be a floating-point"):
            load_prior(saved, dtype=dtype)


def test_a_teacher_becomes_a_diffusion_prior(tmp_path):
    card = {**CARD, "kind": "diffusion", "gamma": None, "image_shape": None}
    save_prior(tmp_path / "teacher", make_network(Denoiser, any_size=True), card)
    prior = load_prior(tmp_path / "teacher", dtype=torch.float32)
    assert isinstance(prior, DiffusionPrior)
    assert (prior.sigma_min, prior.sigma_max, prior.image_shape) == (0.004, 40.0, None)
    x = torch.rand(1, 3, 8, 12)
    expected = make_network(Denoiser, any_size=True)(x, torch.ones(1))
    torch.testing.assert_close(prior.denoise(x, 1.0), expected)
    assert prior.with_steps(2).sample(x, 1.0).shape == x.shape
    assert prior.with_steps(2).sample(torch.rand(1, 3, 8, 9), 1.0).shape == (1, 3, 8, 9)


def test_each_load_is_a_new_prior(saved):
    assert load_prior(saved).network is not load_prior(saved).network


def test_damaged_weights(saved):
    path = Path(f"{saved}.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damaged in (bytes(flipped), whole[:-100], whole[:4], b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tiny\.safetensors must have the SHA-256 of"):
            load_prior(saved)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps({}), b"\xff" * 64])
def test_weights_that_are_no_safetensors(saved, content):
    Path(f"{saved}.safetensors").write_bytes(content)
    rewrite_card(saved, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        load_prior(saved)


def test_weights_of_another_network(saved):
    state = safetensors.torch.load_file(f"{saved}.safetensors")
    first, second, *_ = sorted(state)
    rewrite_weights(
        saved, {name: state[name] for name in state if name != first} | {"extra": torch.ones(1)}
    )
    with pytest.raises(CheckpointError, match=f"missing: {first}; unexpected: extra"):
        load_prior(saved)
    rewrite_weights(saved, {**state, first: torch.ones(7)})
    with pytest.raises(CheckpointError, match=f"of another shape: {first}"):
        load_prior(saved)
    rewrite_weights(saved, {**state, second: state[second] * math.nan})
    with pytest.raises(CheckpointError, match=f"not finite: {second}"):
        load_prior(saved)


def test_missing_files(saved):
    Path(f"{saved}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*tiny\.safetensors"):
        load_prior("tiny")
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere\.json"):
        load_prior(saved.parent / "nowhere")
    Path(f"{saved}.json").unlink()
    Path(f"{saved}.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tiny\.json must be readable"):
        load_prior(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        ("[" * 100_000, "nested at most 32 deep"),
        ('{"gamma": ' + "9" * 5000 + "}", "must be JSON: Exceeds the limit"),
        (" " * (2 << 20), "must have at most 1048576 bytes"),
        ("[1, 2]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ("{}", "lacks the keys 'name', 'kind'"),
    ],
)
def test_cards_that_are_none(saved, text, message):
    Path(f"{saved}.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_prior(saved)


def test_card_that_is_no_text(saved):
    Path(f"{saved}.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"tiny\.json must be the card of a prior"):
        load_prior(saved)


POINT = {"temperature": 0.5, "noise": 0.7, "first": 3.0, "smallest": 0.05, "last": 0.0}

BAD_FIELDS = [
    ("name", 3, "name must be a text"),
    ("name", "", "name must be a text"),
    ("kind", "gan", "kind must be one of ncvsd, diffusion"),
    ("kind", ["ncvsd"], "kind must be one of"),
    ("kind", "diffusion", "gamma must be null"),
    ("network", "ncvsd_inverse.networks.Denoiser", "network must be an object"),
    ("network", {}, r"network\['kind'\] must be a text"),
    ("network", {"kind": "os.system"}, "configuration cannot be built"),
    ("network", {"kind": "concat", "resolution": 8}, "configuration cannot be built"),
    ("image_shape", [3, 8], r"image_shape must be \[C, H, W\]"),
    ("image_shape", [3, 8, 8.0], "image_shape must be"),
    ("image_shape", [3, 8, True], "image_shape must be"),
    ("image_shape", [3, 8, -8], "image_shape must be"),
    ("image_shape", "388", "image_shape must be"),
    ("image_shape", [3, 16, 16], r"image_shape must be \(3, 8, 8\), got \(3, 16, 16\)"),
    ("image_shape", None, r"image_shape must be \(3, 8, 8\), got None"),
    ("gamma", None, "gamma must be a positive"),
    ("gamma", "0.4", "gamma must be a positive"),
    ("gamma", True, "gamma must be a positive"),
    ("sigma_min", -1, "sigma_min must be a positive"),
    ("sigma_min", 50.0, "sigma_min must be below sigma_max"),
    ("sigma_max", math.inf, "sigma_max must be finite, got inf"),
    ("sha256", "abc", "sha256 must be 64"),
    ("sha256", 7, "sha256 must be 64"),
    ("licence", None, "licence must be a text"),
    ("training", [], "training must be an object"),
    ("noise_scale", [[0.1, 0.0]], "noise_scale must be pairs of positive"),
    ("noise_scale", [0.1], "noise_scale must be pairs"),
    ("noise_scale", "wide", "noise_scale must be pairs"),
    ("points", {}, "points must hold settings for 'other' families"),
    ("points", {"other": 3}, "points must be settings by family"),
    ("points", {"other": {"ten": {}}}, "points must be settings by family"),
    ("points", {"other": {"10": {"temperature": 1}}}, "points must be settings by family"),
    ("points", {"other": {"10": {**POINT, "temperature": 2}}}, "temperature must be at most 1"),
    ("points", {"other": {"10": {**POINT, "first": "3"}}}, r"\[10\]\.first must be a positive"),
    ("points", {"other": {"0": POINT}}, "must be of at least 1 call"),
    ("surprise", 1, "unknown keys: surprise; known are name, kind"),
    ("gama", 1, r"did you mean gamma\?"),
    ("name", "a\x1b[2J", "name must have no control characters"),
    ("data", "\ud800", "data' must be text without half characters"),
    ("gamma", 10**400, "gamma must be an integer of at most 64 bits"),
    ("gamma", -0.1, "gamma must be a positive"),
    ("noise_scale", [[0.1, 10**400]], r"noise_scale\.0\.1 must be an integer of at most 64 bits"),
    ("noise_scale", [[0.1, True]], "noise_scale must be pairs"),
    ("noise_scale", [["0.1", "2"]], "noise_scale must be pairs"),
    ("points", {"other": {"10": {**POINT, "first": math.nan}}}, r"other\.10\.first must be finite"),
    ("training", {"deep": [[[[[math.nan]]]]]}, r"training\.deep\.0.* must be finite"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_bad_card_fields_are_named(saved, field, value, message):
    rewrite_card(saved, **{field: value})
    with pytest.raises(CheckpointError, match=message):
        load_prior(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"any_size": "false"}, "any_size must be true or false, got 'false'"),
        ({"sigma_data": "0.5"}, "sigma_data must be a number, got '0.5'"),
        ({"sigma_data": 0}, "sigma_data must be positive"),
        ({"sigma_data": True}, "sigma_data must be a number, got True"),
        ({"resolution": "8"}, "resolution must be an integer, got '8'"),
        ({"resolution": 8.0}, "resolution must be an integer"),
        ({"resolution": -8}, "resolution must be at least 1, got -8"),
        ({"image_channels": 0}, "image_channels must be at least 1"),
        ({"channels": "12"}, "channels must be a list of at most 16 levels"),
        ({"channels": [8] * 17}, "channels must be a list of at most 16 levels"),
        ({"channels": [8.5, 16]}, r"channels\[0\] must be an integer, got 8.5"),
        ({"channels": [8, 2**40]}, r"channels\[1\] must be at most 16384"),
        ({"channels": []}, "channels must be of 1 to 16 levels, got 0"),
        ({"attention": "8"}, "attention must be a list of integers"),
        ({"attention": [8] * 10**5}, "attention must be at most 16 sides, got 100000"),
        ({"blocks": True}, "blocks must be an integer from 1 to 100"),
        ({"blocks": 10**5}, "blocks must be an integer from 1 to 100, got 100000"),
        ({"blocks": 60}, "blocks must fit the .* tensors of its weights, got 60 at each of 2"),
        ({"head_channels": -64}, "head_channels must be at least 1, got -64"),
        ({"attention": [8], "channels": [20], "head_channels": 6}, "heads that divide 20"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"bottleneck_attention": "x"}, "bottleneck_attention must be true or false"),
        ({"blcks": 1}, r"unknown keys: blcks \(did you mean blocks\?\); known are"),
        ({"kind": "adm", "arguments": [1]}, "arguments must be an object, got list"),
        ({"kind": "adm", "arguments": {"blocks": 10**5}}, "blocks must be an integer from 1 to"),
        ({"kind": "edm", "arguments": {"num_blocks": 10**5}}, "num_blocks must be an integer"),
        ({"kind": "diffusers", "arguments": {"layers_per_block": 10**5}}, "layers_per_block must"),
    ],
)
def test_networks_of_cards_are_bounded_before_they_are_built(saved, changes, message):
    network = json.loads(Path(f"{saved}.json").read_text())["network"]
    rewrite_card(saved, network={**network, **changes})
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        load_prior(saved)
    assert time.perf_counter() - begun < 1


def test_statistics_of_other_channels_than_the_network_are_refused(saved):
    grey = {"mean": [[[0.0]]], "mixing": [[1.0]], "spectra": [[[1.0, 0.5]]] * 3}
    rewrite_card(saved, statistics={**STATISTICS, **grey})
    with pytest.raises(CheckpointError, match="statistics must be of 3 channels, got 1"):
        load_prior(saved)


@pytest.mark.parametrize("dtype", ["I32", "F8_E4M3", "F4", "C64", "F128"])
def test_weights_of_dtypes_that_none_have(saved, dtype):
    """Some are of no torch dtype, some of another size than their bytes, one is of no format."""
    content = Path(f"{saved}.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["logvar_linear.weight"]["dtype"] = dtype
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
    Path(f"{saved}.safetensors").write_bytes(changed)
    rewrite_card(saved, sha256=hashlib.sha256(changed).hexdigest())
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors must"):
        load_prior(saved)
    Path(f"{saved}.json").unlink()
    with pytest.raises(CheckpointError, match=r"known dtypes|not of floating point"):
        load_prior(Path(f"{saved}.safetensors"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_card_that_is_a_pipe_is_not_waited_for(saved):
    Path(f"{saved}.json").unlink()
    os.mkfifo(f"{saved}.json")
    with pytest.raises(CheckpointError, match=r"tiny\.json must be .* it must be a regular file"):
        load_prior(saved)
    assert "tiny" not in list_priors()


def test_a_card_cannot_ask_for_more_memory_than_the_weights_hold(saved):
    network = json.loads(Path(f"{saved}.json").read_text())["network"]
    rewrite_card(saved, network={**network, "channels": [10**4, 10**4]})
    with pytest.raises(CheckpointError, match="of another shape"):
        load_prior(saved)


def test_a_discriminator_is_no_prior(saved, tmp_path):
    network = json.loads(Path(f"{saved}.json").read_text())["network"]
    rewrite_card(saved, network={**network, "kind": "concat_discriminator"})
    with pytest.raises(CheckpointError, match="kind 'ncvsd' cannot have a ConcatDiscriminator"):
        load_prior(saved)
    with pytest.raises(TypeError, match=r"network must be one of .* got ConcatDiscr"):
        save_prior(tmp_path / "other", make_network(ConcatDiscriminator), CARD)


def test_save_writes_a_complete_card(saved):
    entries = json.loads(Path(f"{saved}.json").read_text())
    assert entries["network"]["kind"] == "concat"
    weights = Path(f"{saved}.safetensors").read_bytes()
    assert entries["sha256"] == hashlib.sha256(weights).hexdigest()
    assert PriorCard.from_dict(entries).to_json() == Path(f"{saved}.json").read_text()


def test_spread_comes_back_with_the_prior(tmp_path):
    stem = tmp_path / "wide"
    save_prior(stem, make_network(), {**CARD, "noise_scale": [[0.1, 1.2], [2, 0.9]]})
    assert load_prior(stem).noise_scale == ((0.1, 1.2), (2.0, 0.9))
    entries = json.loads(Path(f"{stem}.json").read_text())
    del entries["noise_scale"]  # cards from before there was one
    assert PriorCard.from_dict(entries).noise_scale == ()
    older = PriorCard.from_dict({**entries, "spread": [[0.1, 1.2]]})
    assert older.noise_scale == ((0.1, 1.2),)


def test_settings_of_points_come_back_with_the_prior(tmp_path):
    stem, warm = tmp_path / "found", {**POINT, "temperature": 1}
    points = {"other": {"10": POINT}, "blur": {"4": POINT, "10": warm}}
    save_prior(stem, make_network(), {**CARD, "points": points})
    prior = load_prior(stem)
    assert prior.points[None] == {10: Point(0.5, 0.7, 3.0, 0.05, 0.0)}
    assert prior.points["blur"][10].temperature == 1
    assert json.loads(Path(f"{stem}.json").read_text())["points"] == points
    save_prior(stem, make_network(), CARD)
    assert load_prior(stem).points is None


def test_a_prior_says_what_it_is(saved):
    shown = repr(load_prior(saved))
    assert shown.startswith("<NCVSDPrior tiny: images of 3 x 8 x 8, noise 0.004 to 40, ")
    assert shown.endswith("weights on cpu, no statistics yet>")
    assert "DiffusionPrior: images of any size" in repr(DiffusionPrior(lambda x, s: x))


def test_save_refuses_before_it_writes(tmp_path):
    broken = make_network()
    broken.unet.out_gain.data.fill_(math.nan)
    for network, card, message in [
        (make_network(), {**CARD, "gamma": -1.0}, "gamma must be a positive"),
        (make_network(), {**CARD, "evaluation": {"psnr": math.nan}}, "not JSON compliant"),
        (make_network(), {**CARD, "image_shape": [3, 16, 16]}, "image_shape must be"),
        (make_network(), {**CARD, "kind": "diffusion", "gamma": None}, "cannot have a Concat"),
        (make_network().to_inference(torch.float32), CARD, "not changed by to_inference"),
        (broken, CARD, "not finite: unet.out_gain"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_prior(tmp_path / "bad", network, card)
    assert not list(tmp_path.iterdir())


def test_the_file_is_the_one_that_the_library_would_write(tmp_path):
    state = {
        "layer.weight": torch.rand(3, 4, 3, 3).to(memory_format=torch.channels_last),
        "gain": torch.tensor(0.5),
        "half": torch.rand(5).half(),
        "brain": torch.rand(2, 3).bfloat16(),
        "empty": torch.zeros(0, 3),
        "é": torch.rand(1, dtype=torch.float64),
    }
    plain = {name: value.contiguous() for name, value in state.items()}
    digest = write_tensors(tmp_path / "ours", state)
    content = (tmp_path / "ours").read_bytes()
    assert content == safetensors.torch.save(plain)
    assert digest == hashlib.sha256(content).hexdigest()
    with TensorFile(tmp_path / "ours") as file:
        assert file.shapes == {name: tuple(value.shape) for name, value in state.items()}
        for name, value in state.items():
            assert torch.equal(file.read(name), value)
            assert file.read(name).dtype == value.dtype
    with pytest.raises(ValueError, match=r"tensor count must be floating-point, got torch\.int64"):
        write_tensors(tmp_path / "ours", {"count": torch.tensor(1)})


def test_weights_are_read_one_at_a_time(saved, monkeypatch):
    held, reads = weakref.WeakSet(), []
    read = TensorFile.read

    def watched(file, name):
        # What was read before is a layer by now, in the memory layout and dtype of the network.
        assert not held
        value = read(file, name)
        held.add(value)
        reads.append(name)
        return value

    monkeypatch.setattr(TensorFile, "read", watched)
    network = load_prior(saved, dtype=torch.bfloat16).network
    assert sorted(reads) == sorted(network.state_dict())
    convolutions = [value for value in network.state_dict().values() if value.ndim == 4]
    assert {value.dtype for value in convolutions} == {torch.bfloat16}
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in convolutions)
    trained = load_network(saved)
    assert {value.dtype for value in trained.state_dict().values()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in trained.parameters())
    for name, value in make_network().state_dict().items():
        assert torch.equal(trained.state_dict()[name], value)


def test_a_network_of_a_library_stays_in_float32(tmp_path, arithmetic):
    arguments = {"sample_size": 8, "block_out_channels": [32, 32], "layers_per_block": 1}
    arguments |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config = {
        "kind": "diffusers",
        "arguments": {"in_channels": 3, **arguments},
        "prediction": "epsilon",
        "num_levels": 10,
    }
    network = build_converted(config, "cpu")
    with torch.no_grad():
        for value in network.state_dict().values():
            value.uniform_(-0.1, 0.1)
        network.log_sigmas.copy_(torch.linspace(-3, 3, 10))
    state = network.state_dict()
    digest = write_tensors(tmp_path / "theirs.safetensors", state)
    card = {**CARD, "kind": "diffusion", "gamma": None, "network": config, "sha256": digest}
    (tmp_path / "theirs.json").write_text(json.dumps(card))
    loaded = load_prior(tmp_path / "theirs", dtype=torch.bfloat16)
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, state[name])
    x = torch.rand(1, 3, 8, 8)
    expected = network.eval()(x, torch.ones(1))
    torch.testing.assert_close(loaded.denoise(x, 1.0), expected)
    with arithmetic():
        again = load_prior(tmp_path / "theirs")
        found = again.denoise(x, 1.0)
    assert torch.equal(found, loaded.denoise(x, 1.0))
    assert {value.dtype for value in again.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("broken_step", ["write_bytes", "replace"])
def test_a_failed_save_leaves_the_old_prior_whole(saved, monkeypatch, broken_step):
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    original = getattr(Path, broken_step)

    def fail(path, *arguments):
        if broken_step == "write_bytes":
            original(path, b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, broken_step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_prior(saved, make_network(), {**CARD, "name": "other"})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_saved_files_have_the_usual_permissions(saved):
    other = saved.parent / "other"
    other.touch()
    assert Path(f"{saved}.safetensors").stat().st_mode == other.stat().st_mode


def test_names_are_found_in_the_package_the_folder_and_the_cache(saved, tmp_path):
    assert list_priors() == ["ncvsd_ffhq", "ncvsd_ffhq_teacher", "tiny"]
    assert load_prior("tiny").card.name == "tiny"
    for folder in ("cache/ncvsd_inverse", "package"):
        (tmp_path / folder).mkdir(parents=True)
        save_prior(tmp_path / folder / "tiny", make_network(), {**CARD, "name": folder})
        save_prior(tmp_path / folder / "ncvsd_ffhq", make_network(), {**CARD, "name": "ours"})
    assert load_card("tiny").name == "package"
    assert load_card("ncvsd_ffhq").name == "ours"
    assert list_priors() == ["ncvsd_ffhq", "ncvsd_ffhq_teacher", "tiny"]


def test_unknown_names_list_the_known_ones(saved):
    with pytest.raises(ValueError, match="one of ncvsd_ffhq, ncvsd_ffhq_teacher, tiny, got 'n"):
        load_prior("nowhere")
    with pytest.raises(ValueError, match="did you mean ncvsd_ffhq"):
        load_prior("ncvsd_fhq")
    with pytest.raises(TypeError, match="must be a name or a path"):
        load_prior(3)


def test_a_published_prior_that_is_not_here_says_what_it_needs(
    tmp_path, no_other_priors, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        load_prior("ncvsd_ffhq")
    message = str(caught.value)
    for part in (
        str(tmp_path / "cache" / "ncvsd_inverse"),
        "xypeng9903/ncvsd",
        "ncvsd-ffhq256-xs.pkl",
        "never unpickled",
        "NCVSD_WEIGHTS",
    ):
        assert part in message


def test_a_handle_loads_once_and_stands_for_its_prior(saved):
    handle = PriorHandle("tiny")
    assert repr(handle) == "<prior 'tiny', not loaded>"
    assert not hasattr(handle, "_repr_html_")
    assert repr(handle) == "<prior 'tiny', not loaded>"
    assert handle.image_shape == (3, 8, 8)
    assert repr(handle) == "<prior 'tiny', loaded>"
    assert handle.network is handle.load().network
    u = torch.rand(2, 3, 8, 8)
    draws = [
        source.sample(u, 0.5, generator=torch.Generator().manual_seed(0))
        for source in (handle, handle.load())
    ]
    assert torch.equal(*draws)
    assert handle.nfe_per_sample == 1
    assert handle.refined((1.0, 0.2)).nfe_per_sample == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        handle.no_such_thing  # noqa: B018


def test_a_handle_counts_the_calls_of_its_prior(no_other_priors, monkeypatch):
    teacher = DiffusionPrior(lambda x, sigma: x, num_steps=7)
    monkeypatch.setattr(registry, "load_prior", lambda name, device: teacher)
    handle = PriorHandle("teacher")
    assert handle.nfe_per_sample == 7
    assert handle.load() is teacher


def test_a_handle_goes_where_the_images_are(saved):
    handle = PriorHandle("tiny")
    there = handle.load("meta")
    assert there.device == torch.device("meta")
    assert handle.load() is handle.load(torch.device("meta")) is there
    here = handle.load("cpu")
    assert here.device == torch.device("cpu")
    assert handle.load("cpu") is here is not there
    u = torch.rand(2, 3, 8, 8)
    assert handle.sample(u, 0.5).device == u.device
    assert handle.to("cpu") is handle
    assert handle.network is here.network
    here.to("meta")  # no longer the prior on the CPU
    assert handle.sample(u, 0.5).device == u.device


def test_handles_travel_as_their_names(saved):
    handle = PriorHandle("tiny")
    handle.load()
    for twin in (copy.copy(handle), copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert type(twin) is PriorHandle
        assert repr(twin) == "<prior 'tiny', not loaded>"
        assert twin.image_shape == (3, 8, 8)
    assert len(pickle.dumps(handle)) < 200


def shrink(x, sigma):
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def no_noise(x, time):
    return 0.1 * x


def tiny_prior(cls=NCVSDPrior, network=None, **settings):
    network = network or make_network(ConcatDenoiser if cls is NCVSDPrior else Denoiser)
    return cls(network, image_shape=(3, 8, 8), **settings)


def of_classes():
    network = ConcatDenoiser(replace(SHAPE, num_classes=3))
    return tiny_prior(network=network).conditioned_on(1)


def of_latents():
    network = ConcatDenoiser(replace(SHAPE, image_channels=4))
    return NCVSDPrior(network, image_shape=(4, 8, 8))


def of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    return DiffusionPrior.from_diffusers(unet, diffusers.DDPMScheduler(), num_steps=2)


def of_deepinv():
    denoiser = pytest.importorskip("deepinv").models.MedianFilter()
    return DiffusionPrior.from_deepinv(denoiser, sigma_max=80.0, num_steps=2)


def gaussian(cls=GaussianPrior):
    mean, covariance = torch.zeros(3, 8, 8).double(), torch.eye(192).double()
    if cls is GaussianPrior:
        return GaussianPrior(mean, covariance)
    return cls(
        torch.tensor([0.4, 0.6]), torch.stack((mean, mean + 1)), covariance.expand(2, 192, 192)
    )


def stationary():
    return GaussianPrior.stationary(torch.zeros(3, 8, 8), torch.ones(1, 8, 8))


PRIORS = {
    "ncvsd": tiny_prior,
    "tempered": lambda: tiny_prior().tempered(0.5),
    "refined": lambda: tiny_prior().refined((math.inf, 0.3)),
    "tiled": lambda: tiled(NCVSDPrior(make_network(), image_shape=None), 8, 4),
    "conditioned": of_classes,
    "latent": of_latents,
    "diffusion": lambda: tiny_prior(DiffusionPrior, num_steps=2),
    "of a function": lambda: DiffusionPrior.from_function(shrink, num_steps=2),
    "of eps": lambda: DiffusionPrior.from_eps(no_noise, [0.9, 0.5, 0.1], num_steps=2),
    "of diffusers": of_diffusers,
    "of deepinv": of_deepinv,
    "with statistics": lambda: tiny_prior(DiffusionPrior, statistics=stationary().statistics),
    "gaussian": gaussian,
    "stationary": lambda: stationary().tempered(0.5),
    "mixture": lambda: gaussian(GaussianMixturePrior),
    "shipped": lambda: PriorHandle("ncvsd_faces64"),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors_survive_pickles_and_copies(name):
    """Without what they keep from their first use."""
    prior = PRIORS[name]()
    shape = (4, 8, 8) if name == "latent" else PriorTraits.of(prior).image_shape or (3, 16, 16)
    u = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def use(prior):
        statistics = prior.statistics
        variances = None if statistics is None else statistics.covariance(0.5, u).variances
        return prior.sample(u, 0.5, generator=torch.Generator().manual_seed(1)), variances

    unused, expected = len(pickle.dumps(prior)), use(prior)
    use(prior)
    stored = pickle.dumps(prior)
    assert len(stored) == unused
    for twin in (pickle.loads(stored), copy.deepcopy(prior)):
        assert type(twin) is type(prior)
        torch.testing.assert_close(use(twin), expected, rtol=0, atol=0)


def test_a_prior_of_latents_travels_without_its_decoder():
    prior = LatentPrior(of_latents(), vae="nowhere")
    prior._loaded = torch.nn.Linear(1000, 1000)
    for twin in (pickle.loads(pickle.dumps(prior)), copy.deepcopy(prior)):
        assert (twin.vae, twin.nfe_per_sample, twin._loaded) == ("nowhere", 1, None)


def test_a_gaussian_owns_its_mean():
    mean = torch.zeros(1, 2, 3).double()
    prior = GaussianPrior(mean, torch.eye(6).double())
    mean += 1
    assert not prior.denoise(torch.zeros(1, 1, 2, 3).double(), 1.0).any()


def test_threads_that_share_a_handle_load_it_once(saved, monkeypatch):
    loads, together = [], threading.Barrier(4)

    def slow(name, device):
        loads.append(name)
        time.sleep(0.05)
        return load_prior(name, device)

    monkeypatch.setattr(registry, "load_prior", slow)
    handle, found = PriorHandle("tiny"), []

    def use():
        together.wait()
        found.append(handle.load())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["tiny"]
    assert len({id(prior) for prior in found}) == 1


@pytest.fixture
def no_hub(monkeypatch):
    """Fail whoever asks the hub."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("ncvsd_inverse.priors.hub.fetch", asked)
    monkeypatch.setattr("ncvsd_inverse.priors.registry.fetch_published", asked)


def test_a_description_asks_nobody(saved, no_hub):
    assert describe_prior("tiny") == describe_prior(saved) == load_card(saved)
    entry = describe_prior("ncvsd_ffhq")
    assert (entry.kind, entry.image_shape) == ("ncvsd", (3, 256, 256))
    assert describe_prior("ncvsd_ffhq_teacher").kind == "diffusion"
    for away in ("someone/faces", "hf:someone/faces", "nowhere/else.pkl", saved.parent / "none"):
        with pytest.raises(CheckpointError, match="there is no"):
            describe_prior(away)
    with pytest.raises(ValueError, match="prior must be one of"):
        describe_prior("nowhere")
    with pytest.raises(CheckpointError, match="ncvsd_faces64 needs"):
        describe_prior("ncvsd_faces64")


@pytest.mark.parametrize(
    "path",
    [
        "./someone/faces",
        "../faces",
        "/nowhere/faces",
        "~/nowhere/faces",
        "here/faces",
        "here/faces/model.pkl",
        "one/two/three",
        "someone/faces.pkl",
        "someone/faces.json",
        "faces.safetensors",
        Path("someone/faces"),
    ],
)
def test_a_path_that_is_not_there_is_said_without_asking_the_hub(path, saved, no_hub):
    (saved.parent / "here").mkdir()
    for load in (load_prior, load_card, load_network):
        with pytest.raises(CheckpointError, match=r"there is no .*, and no .*: a prior needs"):
            load(path)


@pytest.mark.parametrize("stem", ["prior", "model"])
def test_folders_of_runs_and_of_saved_priors_are_taken(saved, stem, monkeypatch):
    monkeypatch.setenv("NCVSD_WEIGHTS", "")
    run = saved.parent / "runs" / "student"
    run.mkdir(parents=True)
    (run / "state.safetensors").write_bytes(b"the state of the training")
    for load in (load_prior, load_card, load_network, describe_prior):
        with pytest.raises(CheckpointError, match=r"not written a prior yet; .*--seconds 0 does"):
            load(run)
    save_prior(run / stem, make_network(), CARD)
    for path in (run, str(run), "runs/student"):
        assert load_prior(path).card == load_card(path) == describe_prior(path)
        assert type(load_network(path)) is ConcatDenoiser
    monkeypatch.chdir(run.parent)
    assert load_card("student").name == "tiny"


def test_the_file_of_another_prior_under_a_published_name_is_refused(saved):
    folder = saved.parent
    save_prior(folder / "ncvsd_ffhq_teacher", make_network(), CARD)
    for load in (load_prior, load_card, describe_prior):
        with pytest.raises(CheckpointError, match="of kind 'diffusion', got one of kind 'ncvsd'"):
            load("ncvsd_ffhq_teacher")


def test_a_handle_without_weights_says_what_it_needs_each_time(no_other_priors):
    handle = PriorHandle("ncvsd_faces64")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"ncvsd_faces64 needs ncvsd_faces64\.safe"):
            handle.sample(torch.zeros(1, 3, 64, 64), 1.0)
        with pytest.raises(CheckpointError, match="do not ship with this version"):
            handle.image_shape  # noqa: B018


def test_importing_handles_loads_nothing():
    code = (
        "import sys\n"
        "from ncvsd_inverse import priors\n"
        "for name in ('ncvsd_faces64', 'ncvsd_ffhq', 'ncvsd_natural'):\n"
        "    for handle in (getattr(priors, name), getattr(priors, f'{name}_teacher')):\n"
        "        assert repr(handle).endswith('not loaded>'), handle\n"
        "heavy = {'lpips', 'piq', 'kornia', 'deepinv', 'matplotlib', 'torchvision', 'accelerate',\n"
        "         'huggingface_hub', 'scipy', 'rich', 'typer'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": "."}
    )


STATISTICS = {
    "mean": [[[0.1, -0.2]], [[0.3, 0.0]], [[0.2, 0.5]]],
    "mixing": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]],
    "levels": [0.1, 2.0],
    "radii": [0.0, 0.25],
    "spectra": [[[1e-5, 0.25]] * 3, [[1.5, 0.5]] * 3, [[12.0, 1.0]] * 3],
}


@pytest.mark.parametrize("kind", ["ncvsd", "diffusion"])
def test_statistics_come_back_with_the_prior(tmp_path, kind):
    stem, is_student = tmp_path / "measured", kind == "ncvsd"
    card = {**CARD, "kind": kind, "gamma": 0.3 if is_student else None, "statistics": STATISTICS}
    written = save_prior(stem, make_network(ConcatDenoiser if is_student else Denoiser), card)
    prior = load_prior(stem)
    assert prior.statistics is prior.card.statistics
    for read in (written.statistics, prior.statistics):
        assert read.to_dict() == STATISTICS
        assert read.levels == pytest.approx((0.1, 2.0))
    assert prior.with_statistics(None).card.statistics is not None
    entries = json.loads(Path(f"{stem}.json").read_text())
    assert entries["statistics"] == STATISTICS
    for old in (
        {**entries, "statistics": None},
        {k: entries[k] for k in entries.keys() - {"statistics"}},
    ):
        assert PriorCard.from_dict(old).statistics is None
    rewrite_card(stem, statistics=None)
    assert load_prior(stem).statistics is None


def test_a_card_keeps_lists_of_numbers_on_one_line_and_texts_as_they_are(saved):
    entries = json.loads(Path(f"{saved}.json").read_text())
    texts = {"weaknesses": "breaks [\n  1,\n  2\n] and [ 3 ]", "data": "é [\n]"}
    training = {
        "empty": [],
        "names": ["a", "b"],
        "mixed": [1, None],
        "deep": [[1, 2], [3.5, -1e-9]],
    }
    card = PriorCard.from_dict(
        {
            **entries,
            **texts,
            "training": training,
            "noise_scale": [[0.1, 1.2]],
            "statistics": STATISTICS,
        }
    )
    text = card.to_json()
    again = PriorCard.from_json(text)
    assert (again.weaknesses, again.data) == (texts["weaknesses"], texts["data"])
    assert (again.training, again.noise_scale) == (training, ((0.1, 1.2),))
    assert again.statistics.to_dict() == STATISTICS
    lines = [line.strip(" ,") for line in text.splitlines()]
    for line in (
        '"image_shape": [3, 8, 8]',
        '"levels": [0.1, 2.0]',
        "[1e-05, 0.25]",
        "[0.1, 1.2]",
        "[3.5, -1e-09]",
    ):
        assert line in lines
    assert again.to_json() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (5, "statistics must be an object with the fields mean, mixing"),
        ([], "statistics must be an object"),
        ({}, "statistics must be an object with the fields"),
        ({**STATISTICS, "more": 1}, "statistics must be an object with the fields"),
        ({**STATISTICS, "levels": ["low"]}, "statistics' levels must be numbers"),
        ({**STATISTICS, "levels": [2.0, 0.1]}, "levels must increase"),
        ({**STATISTICS, "radii": [0.0]}, r"spectra must have shape \(3, 3, 1\)"),
        ({**STATISTICS, "mean": [[None]]}, "statistics' mean must be numbers in 3"),
        ({**STATISTICS, "spectra": [[[0.0, 1.0]] * 3] * 3}, "spectra must be positive"),
        ({**STATISTICS, "mixing": [[1.0] * 3] * 3}, "orthonormal rows"),
    ],
)
def test_bad_statistics_are_named(saved, change, message):
    rewrite_card(saved, statistics=change)
    with pytest.raises(
        CheckpointError, match=rf"tiny\.json must be the card of a prior: .*{message}"
    ):
        load_prior(saved)


def test_loading_does_not_depend_on_the_callers_arithmetic(saved, arithmetic):
    expected = load_prior("tiny").network.state_dict()
    with arithmetic():
        network = load_prior("tiny").network
        trained = load_network("tiny")
    found = network.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    tensors = [*network.parameters(), *trained.parameters(), *trained.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in trained.parameters())


def test_threads_that_load_at_once_get_the_same_prior(saved, at_once):
    u = torch.rand(1, 3, 8, 8)

    def draw(prior):
        return prior.sample(u, 0.5, generator=torch.Generator().manual_seed(0))

    alone = draw(load_prior("tiny"))
    handle = PriorHandle("tiny")
    drawn = at_once([lambda: draw(load_prior("tiny")), lambda: draw(handle)] * 4)
    assert all(torch.equal(one, alone) for one in drawn)
    found = at_once([handle.load] * 8)
    assert len({id(prior) for prior in found}) == 1
