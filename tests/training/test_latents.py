"""Latents: how they are encoded, stored, drawn anew at each visit, and shown."""

import io
import itertools
import json
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from ncvsd_inverse import solve
from ncvsd_inverse.cli import app
from ncvsd_inverse.networks import ConcatDenoiser, UNetShape
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Denoise
from ncvsd_inverse.priors import LatentPrior, NCVSDPrior, load_prior
from ncvsd_inverse.priors.latent import decode_latents, load_vae
from ncvsd_inverse.training import TeacherConfig, TeacherTrainer
from ncvsd_inverse.training.data import ImageData, LatentData, StreamedData, read_data
from ncvsd_inverse.training.data.latents import draw_latents, encode_images
from ncvsd_inverse.training.progress import LATENT_SIDE, ProgressReport

# Of raw latents of ImageNet-512, from EDM2.
MEANS = torch.tensor([5.81, 3.25, 0.12, -2.15]).view(4, 1, 1)
STDS = torch.tensor([4.17, 4.62, 3.71, 3.28]).view(4, 1, 1)


def make_moments(num, side=8, *, seed=0):
    """Return means like those of raw latents and stds of about 1, (N, 8, side, side)."""
    source = torch.Generator().manual_seed(seed)
    means = MEANS + STDS * torch.randn(num, 4, side, side, generator=source)
    stds = 0.5 + torch.rand(num, 4, side, side, generator=source)
    return torch.cat([means, stds], 1)


def as_npy(values, dtype=np.float32):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype=dtype))
    return buffer.getvalue()


def latent_files(num, dtype=np.float32):
    return {
        f"0/{number:03}.npy": as_npy(moments, dtype)
        for number, moments in enumerate(make_moments(num))
    }


def write_zip(path, files, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def first(data, num, *, start=0, size=6, seed=3, rows=None):
    batches = data.batches(start, size, seed=seed, rows=rows)
    return torch.cat([batch.images for batch in itertools.islice(batches, num)])


def test_latents_are_drawn_from_their_law_and_brought_to_half_a_unit():
    moments = make_moments(1, side=4)
    sources = make_generators([(0, place) for place in range(4000)])
    draws = draw_latents(moments.expand(4000, -1, -1, -1), sources)
    scale = 0.5 / STDS
    expected, spread = (moments[0, :4] - MEANS) * scale, moments[0, 4:] * scale
    # Four standard errors; the largest of 64 entries is some three away.
    assert float(((draws.mean(0) - expected) / spread).abs().max()) < 4.5 / 4000**0.5
    assert float((draws.std(0) / spread - 1).abs().max()) < 4.5 / 8000**0.5

    sharp = make_moments(100)
    sharp[:, 4:] = 0
    latents = draw_latents(sharp, make_generators([(0, place) for place in range(100)]))
    assert latents.dtype == torch.float32
    channels = latents.transpose(0, 1).flatten(1)
    assert torch.allclose(channels.mean(1), torch.zeros(4), atol=0.03)  # 4 standard errors
    assert torch.allclose(channels.std(1), torch.full((4,), 0.5), atol=0.02)


def test_a_visit_is_drawn_from_seed_and_place_alone(tmp_path):
    source = write_zip(tmp_path / "all.zip", latent_files(5))
    memory = read_data(source, flip=False)
    streamed = read_data(source, flip=False, memory_gib=0, workers=0)
    assert isinstance(memory, LatentData)
    assert isinstance(streamed, StreamedData)
    for data in (memory, streamed):
        assert data.image_shape == (4, 8, 8)
        whole = first(data, 4)  # 24 places: each latent four times and more
        assert torch.equal(whole, first(memory, 4))
        assert torch.equal(first(data, 2, start=2), whole[12:])
        thirds = [first(data, 4, rows=slice(part, None, 3)) for part in range(3)]
        assert torch.equal(
            torch.stack([t.unflatten(0, (4, 2)) for t in thirds], 2).flatten(0, 2), whole
        )
        assert len(whole.flatten(1).unique(dim=0)) == 24  # no visit is like another
        assert not torch.equal(whole, first(data, 4, seed=4))


def test_batches_hold_the_latents_of_their_labels(tmp_path):
    files = latent_files(3)
    labels = [[name, 2 - number] for number, name in enumerate(files)]
    source = write_zip(tmp_path / "all.zip", files, labels)
    data = read_data(source, flip=False, labels=True, resolution=8, channels=4)
    assert data.num_classes == 3
    batch = next(data.batches(0, 60, seed=0))
    scale = 0.5 / STDS
    for number, moments in enumerate(make_moments(3)):
        drawn = batch.images[batch.labels.argmax(1) == 2 - number]
        assert len(drawn) == 20
        error = (drawn.mean(0) / scale + MEANS - moments[:4]) / moments[4:]
        assert float(error.abs().max()) < 4.5 / 20**0.5


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_folders_and_zips_of_either_precision_are_read(tmp_path, dtype):
    files = latent_files(4, dtype)
    source = write_zip(tmp_path / "all.zip", files)
    with zipfile.ZipFile(source) as archive:
        archive.extractall(tmp_path / "folder")
    expected = make_moments(4).numpy().astype(dtype).astype(np.float32)
    for place in (source, tmp_path / "folder"):
        data = read_data(place, flip=False)
        assert data.moments.dtype == torch.float32
        assert np.array_equal(data.moments.numpy(), expected)


class Trap:
    """An object that leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def with_object(path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Trap(path)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def disguised(path):
    """Return a header of sound values over a pickle that runs code."""
    return as_npy(np.zeros((8, 8, 8)))[:128] + pickle.dumps(Trap(path)) * 100


good = make_moments(1)[0].numpy()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no numbers", "magic string"),
        (pickle.dumps(1), "magic string"),
        (as_npy(good)[:-1], "EOF|bytes"),
        (as_npy(good)[:40], "EOF"),
        (as_npy(good, np.float64), r"float64 \(8, 8, 8\), a latent is float16 or float32 \(8, H"),
        (as_npy(good[:4]), r"float32 \(4, 8, 8\)"),
        (as_npy(good[0]), r"float32 \(8, 8\)"),
        (as_npy(good * np.nan), "not finite"),
        (as_npy(-good), "below 0"),
    ],
)
def test_wrong_files_are_unusable_and_named(tmp_path, content, reason):
    files = latent_files(101)
    files["0/050.npy"] = content
    source = write_zip(tmp_path / "all.zip", files)
    memory = read_data(source, flip=False)
    assert memory.skipped == ["0/050.npy"]
    assert torch.equal(memory.moments[50], memory.moments[51])
    streamed = read_data(source, flip=False, memory_gib=0, workers=0)
    assert torch.equal(first(streamed, 2, size=101), first(memory, 2, size=101))
    assert streamed.skipped == memory.skipped
    with pytest.raises(ValueError, match=rf"at most 0 of the 1 .*only\.npy: .*({reason})"):
        read_data(write_zip(tmp_path / "one.zip", {"only.npy": content}), flip=False)


def test_no_file_runs_code(tmp_path):
    trap = str(tmp_path / "sprung")
    for content in (with_object(trap), disguised(trap), pickle.dumps(Trap(trap))):
        files = latent_files(101) | {"0/050.npy": content}
        source = write_zip(tmp_path / "all.zip", files)
        data = read_data(source, flip=False)
        first(data, 1)
        assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match="object"):
        read_data(write_zip(tmp_path / "one.zip", {"a.npy": with_object(trap)}), flip=False)


def picture(seed, height=16, width=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_what_does_not_fit_is_refused_in_plain_words(tmp_path):
    latents = write_zip(tmp_path / "latents.zip", latent_files(2))
    pictures = write_zip(tmp_path / "pictures.zip", {"0.png": as_png(picture(0, 8, 8))})
    mixed = write_zip(tmp_path / "mixed.zip", latent_files(2) | {"a.png": as_png(picture(0))})
    for source, options, message in [
        (mixed, {}, r"images or latents \(\.npy\), got both: 0/000\.npy and a\.png"),
        (latents, {}, "flip must be false .* mirrored latent is not the latent"),
        (latents, {"flip": False, "crop": 4}, r"crop must be None \(any_size false\) .*got 4"),
        (latents, {"flip": False, "channels": 3}, r"\(network\.image_channels\) must be 4 .*got 3"),
        (pictures, {"channels": 4}, r"must be 3 for .*pictures, got 4; `ncvsd encode`"),
        (latents, {"flip": False, "resolution": 64}, r"must be 64 x 64 .*got 8 x 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_data(source, **options)
    with pytest.raises(ValueError, match="must hold pictures, got latents"):
        ImageData.read(latents)
    with pytest.raises(ValueError, match=r"moments must be float32 of shape \(N, 8, H, W\)"):
        LatentData(torch.zeros(2, 4, 8, 8))


class PlainVAE(nn.Module):
    """A VAE whose pictures are the first three channels of raw latents."""

    def decode(self, raw):
        return type("Output", (), {"sample": raw[:, :3]})


def test_decoding_undoes_what_drawing_does():
    moments = torch.zeros(2, 8, 4, 4)
    moments[:, :3] = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = draw_latents(moments, make_generators([(0, 0), (0, 1)]))
    pictures = decode_latents(PlainVAE(), latents)
    assert torch.allclose(pictures, moments[:, :3] * 2 - 1, atol=1e-5)
    assert float(decode_latents(PlainVAE(), 10 * latents).abs().max()) <= 1


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Folder of a tiny VAE that halves the sides of pictures."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Folder of twelve pictures of two classes."""
    for number in range(12):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, 16, 16 + number % 3).save(folder / f"{number:02}.png")
    return tmp_path / "pictures"


OPTIONS = {"size": 16, "batch_size": 5, "workers": 0}


@pytest.mark.parametrize("half", [False, True])
def test_pictures_are_encoded_to_what_the_vae_says(tmp_path, pictures, vae, half):
    target = tmp_path / "latents.zip"
    left = tmp_path / f".latents.zip.{2**22 + 1}.7.part"  # of a process that cannot be there
    left.write_bytes(b"half")
    state = torch.get_rng_state()
    encoded = encode_images(pictures, target, vae=vae, half=half, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoded == (12, 2, [])
    assert not left.exists()
    data = read_data(target, flip=False, labels=True, resolution=8)
    assert data.num_classes == 2
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    with zipfile.ZipFile(target) as archive:
        stored = np.load(io.BytesIO(archive.read("00000/00000000.npy")), allow_pickle=False)
        assert stored.dtype == (np.float16 if half else np.float32)
    model = load_vae(vae)
    for index, name in ((0, "a/00.png"), (4, "a/08.png"), (11, "b/11.png")):
        pixels = torch.from_numpy(np.array(Image.open(pictures / name))).permute(2, 0, 1)
        left = (pixels.shape[2] - 16) // 2
        law = model.encode(pixels[None, :, :, left : left + 16] / 255).latent_dist
        expected = torch.cat([law.mean, law.std], 1)[0]
        assert torch.allclose(data.moments[index], expected, rtol=2**-10, atol=1e-4)


def test_a_broken_picture_is_skipped_and_many_are_refused(tmp_path, vae):
    files = {f"{number:03}.png": as_png(picture(number)) for number in range(101)}
    files["040.png"] = files["040.png"][:60]
    source = write_zip(tmp_path / "pictures.zip", files)
    target = tmp_path / "latents.zip"
    encoded = encode_images(source, target, vae=vae, labels=False, **OPTIONS)
    assert encoded == (100, 0, ["040.png"])
    data = read_data(target, flip=False)
    assert len(data) == 100
    assert data.skipped == []
    with pytest.raises(ValueError, match=r"dataset\.json"):
        read_data(target, flip=False, labels=True)

    files["100.png"] = b"no picture"
    source = write_zip(tmp_path / "pictures.zip", files)
    with pytest.raises(ValueError, match=r"at most 1 of the 101 .*got 2: 040\.png.*100\.png: no"):
        encode_images(source, tmp_path / "none.zip", vae=vae, labels=False, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.zip", "pictures.zip"]


def test_wrong_encoding_is_refused_before_it_starts(tmp_path, pictures, vae):
    latents = write_zip(tmp_path / "latents.zip", latent_files(1))
    (tmp_path / "flat").mkdir()
    picture(0).save(tmp_path / "flat" / "0.png")
    target = tmp_path / "new.zip"
    for source, options, message in [
        (latents, {}, "source must hold pictures, got latents"),
        (pictures, {"target": latents}, r"zip that does not exist yet, got .*latents\.zip"),
        (pictures, {"target": tmp_path / "new"}, "target must be a zip"),
        (pictures, {"size": 17}, "size must be a multiple of 2 for this VAE, got 17"),
        (pictures, {"batch_size": 0}, "batch_size must be at least 1"),
        (pictures, {"vae": tmp_path / "flat"}, "vae must be a VAE on Hugging Face or a folder"),
        (tmp_path / "flat", {}, r"sub-folders, got 0\.png .*--no-labels"),
    ]:
        settings = OPTIONS | {"target": target, "vae": vae} | options
        with pytest.raises(ValueError, match=message):
            encode_images(source, settings.pop("target"), **settings)
        assert not target.exists()


def test_a_vae_of_other_channels_is_refused(tmp_path, vae):
    config = json.loads((vae / "config.json").read_text())
    loaded = pytest.importorskip("diffusers").AutoencoderKL.from_config(
        config | {"latent_channels": 3}
    )
    loaded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from 3 channels to 4, got 3 to 3"):
        load_vae(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'ncvsd-inverse\[latents\]'"):
        load_vae()


CONFIG = """
images = 8
batch_size = 4
flip = false
precision = "float32"
[network]
resolution = 8
image_channels = 4
channels = [16, 16]
blocks = 1
attention = []
num_classes = 2
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's dependencies
def test_commands_encode_and_train(tmp_path, pictures, vae, monkeypatch):
    (tmp_path / "teacher.toml").write_text(CONFIG)
    target, run = tmp_path / "latents.zip", tmp_path / "run"

    def call(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    options = ["--vae", vae, "--size", "16", "--batch", "4", "--workers", "0", "--device", "cpu"]
    assert "12 latents, 2 classes" in call("encode", pictures, target, *options)
    # The VAE is not on this machine, so there are no pictures, which is said once.
    monkeypatch.setitem(sys.modules, "diffusers", None)
    output = call("train", tmp_path / "teacher.toml", "--data", target, "-o", run)
    assert output.count("no pictures of latents") == 1
    assert "finished after 8 images" in output
    assert not (run / "pictures").exists()
    assert load_prior(run / "prior").image_shape == (4, 8, 8)

    result = CliRunner().invoke(
        app, ["train", str(tmp_path / "teacher.toml"), "--data", str(pictures), "-o", str(run)]
    )
    assert "image_channels) must be 3" in str(result.exception)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_latents_are_shown_as_pictures(tmp_path, vae, monkeypatch):
    asked = []

    def load_tiny(*, device, download):
        asked.append(download)
        return load_vae(vae, device=device, download=download)

    monkeypatch.setattr("ncvsd_inverse.training.progress.load_vae", load_tiny)
    shape = UNetShape(resolution=8, image_channels=4, channels=(16, 16), blocks=1, attention=())
    config = TeacherConfig(network=shape, images=8, batch_size=4, flip=False, precision="float32")
    run = TeacherTrainer(config, LatentData(make_moments(4)), tmp_path)
    watcher = ProgressReport(run, next(run.data.batches(0, 2, seed=0)).images)
    assert asked == [False], "a picture is not worth a download"
    watcher.on_checkpoint()
    with Image.open(next((tmp_path / "pictures").iterdir())) as grid:
        # Two columns and ten rows of pictures of 16 pixels, framed by two.
        assert (grid.width, grid.height, grid.mode) == (2 * 18 + 2, 10 * 18 + 2, "RGB")

    decode = watcher._decode
    assert decode is not None
    assert decode(torch.zeros(1, 4, 128, 128)).shape == (1, 3, LATENT_SIDE, LATENT_SIDE)


# Priors of latents.


@pytest.fixture
def latent_prior():
    torch.manual_seed(0)
    network = ConcatDenoiser(
        UNetShape(resolution=8, image_channels=4, channels=(8,), blocks=1, num_classes=2)
    )
    return NCVSDPrior(network, image_shape=(4, 8, 8))


def test_a_prior_of_latents_generates_pictures(vae, latent_prior):
    pictures = LatentPrior(latent_prior.conditioned_on(1), vae=vae).generate(3, 2, seed=5)
    assert pictures.shape == (3, 3, 16, 16)
    latents = latent_prior.conditioned_on(1).generate(3, 2, seed=5)
    assert torch.equal(pictures, decode_latents(load_vae(vae), latents))
    assert torch.equal(
        LatentPrior(latent_prior, vae=vae).conditioned_on(1).generate(1, 2, seed=5), pictures[:1]
    )
    with pytest.raises(ValueError, match="label must be below"):
        LatentPrior(latent_prior, vae=vae).conditioned_on(2)


def test_a_prior_of_latents_does_not_restore(latent_prior):
    y = torch.zeros(1, 3, 8, 8)
    for prior in (latent_prior, LatentPrior(latent_prior)):
        with pytest.raises(ValueError, match="prior must be one of pixels"):
            solve(y, operator=Denoise(), prior=prior, nfe=1)


def test_a_prior_of_pixels_is_no_prior_of_latents():
    network = ConcatDenoiser(UNetShape(resolution=8, channels=(8,), blocks=1))
    with pytest.raises(ValueError, match="prior must be one of latents of 4 channels, got 3"):
        LatentPrior(NCVSDPrior(network, image_shape=(3, 8, 8)))
