"""Saving and loading priors: round trips, every kind of damage, names, handles."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import ConcatDenoiser, ConcatDiscriminator, Denoiser, UNetShape
from ncvsd_inverse.priors import (
    DiffusionPrior,
    NCVSDPrior,
    PriorCard,
    PriorHandle,
    list_priors,
    load_card,
    load_prior,
    save_prior,
    zoo,
)

CARD = {
    "name": "tiny",
    "kind": "ncvsd",
    "image_shape": [3, 8, 8],
    "gamma": 0.3,
    "sigma_min": 0.004,
    "sigma_max": 40.0,
    "licence": "research use only",
    "data": "noise",
    "training": {"command": "none", "steps": 0},
    "evaluation": {},
    "weaknesses": "knows nothing",
    "intended_use": "tests",
}


def make_network(cls=ConcatDenoiser, **changes):
    torch.manual_seed(0)
    shape = UNetShape(8, channels=(8, 16), blocks=1, attention=(), head_channels=8)
    network = cls(shape, **changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5 if "gain" in name else 0.3)
    return network


@pytest.fixture
def no_other_priors(tmp_path, monkeypatch):
    """Look for names in an empty package, an empty cache and a folder $NCVSD_WEIGHTS."""
    monkeypatch.setattr(zoo, "PACKAGE_WEIGHTS", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
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
    rewrite_card(stem, sha256=zoo.hashlib.sha256(weights).hexdigest())


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
    assert prior.sample(x, 1.0).shape == x.shape
    with pytest.raises(ValueError, match="multiples of 2"):
        prior.sample(torch.rand(1, 3, 8, 9), 1.0)


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
    rewrite_card(saved, sha256=zoo.hashlib.sha256(content).hexdigest())
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
        ("[" * 100_000, "must be JSON"),
        ("[1, 2]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ("{}", "missing: name, kind"),
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
    ("sigma_max", math.inf, "sigma_max must be a positive finite"),
    ("sha256", "abc", "sha256 must be 64"),
    ("sha256", 7, "sha256 must be 64"),
    ("licence", None, "licence must be a text"),
    ("training", [], "training must be an object"),
    ("spread", [[0.1, 0.0]], "spread must be pairs of positive"),
    ("spread", [0.1], "spread must be pairs"),
    ("spread", "wide", "spread must be pairs"),
    ("surprise", 1, "unknown: surprise"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_bad_card_fields_are_named(saved, field, value, message):
    rewrite_card(saved, **{field: value})
    with pytest.raises(CheckpointError, match=message):
        load_prior(saved)


def test_a_card_cannot_ask_for_more_memory_than_the_weights_hold(saved):
    network = json.loads(Path(f"{saved}.json").read_text())["network"]
    rewrite_card(saved, network={**network, "channels": [10**5, 10**5]})
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
    assert entries["sha256"] == zoo.hashlib.sha256(weights).hexdigest()
    assert PriorCard.from_dict(entries).to_json() == Path(f"{saved}.json").read_text()


def test_spread_comes_back_with_the_prior(tmp_path):
    stem = tmp_path / "wide"
    save_prior(stem, make_network(), {**CARD, "spread": [[0.1, 1.2], [2, 0.9]]})
    assert load_prior(stem).spread == ((0.1, 1.2), (2.0, 0.9))
    entries = json.loads(Path(f"{stem}.json").read_text())
    del entries["spread"]  # cards from before there was one
    assert PriorCard.from_dict(entries).spread == ()


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
    assert list_priors() == ["ncvsd_ffhq", "tiny"]
    assert load_prior("tiny").card.name == "tiny"
    for folder in ("cache/ncvsd_inverse", "package"):
        (tmp_path / folder).mkdir(parents=True)
        save_prior(tmp_path / folder / "tiny", make_network(), {**CARD, "name": folder})
        save_prior(tmp_path / folder / "ncvsd_ffhq", make_network(), {**CARD, "name": "ours"})
    assert load_card("tiny").name == "package"
    assert load_card("ncvsd_ffhq").name == "ours"
    assert list_priors() == ["ncvsd_ffhq", "tiny"]


def test_unknown_names_list_the_known_ones(saved):
    with pytest.raises(ValueError, match="one of ncvsd_ffhq, tiny, got 'nowhere'"):
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
    assert handle.nfe_per_sample == 1
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
    assert handle.refined((1.0, 0.2)).nfe_per_sample == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        handle.no_such_thing  # noqa: B018


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
        "from ncvsd_inverse.priors import ncvsd_faces64, ncvsd_ffhq, ncvsd_natural\n"
        "for handle in (ncvsd_faces64, ncvsd_ffhq, ncvsd_natural):\n"
        "    assert repr(handle).endswith('not loaded>'), handle\n"
        "heavy = {'lpips', 'piq', 'kornia', 'deepinv', 'matplotlib', 'torchvision', 'accelerate',\n"
        "         'huggingface_hub', 'scipy', 'rich', 'typer'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[1]
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
        {**entries, **texts, "training": training, "spread": [[0.1, 1.2]], "statistics": STATISTICS}
    )
    text = card.to_json()
    again = PriorCard.from_json(text)
    assert (again.weaknesses, again.data) == (texts["weaknesses"], texts["data"])
    assert (again.training, again.spread) == (training, ((0.1, 1.2),))
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
