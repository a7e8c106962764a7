"""Forward models of users' files: masks, kernels, arrays and pictures of many kinds."""

import io
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ncvsd_inverse import cli, make_task
from ncvsd_inverse.cli.masks import read_array, read_kernel, read_mask
from ncvsd_inverse.cli.models import Model
from ncvsd_inverse.images import Picture, centre_crop, read_image, read_picture, write_picture
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import Blur, GaussianBlur, SuperResolution
from ncvsd_inverse.priors.selfcheck import PHOTOGRAPH

KNOWN = np.random.default_rng(0).random((24, 32)) < 0.7


def grey(values):
    return Image.fromarray(np.where(KNOWN, *values).astype(np.uint8))


def palette():
    picture = grey((1, 0)).convert("P")
    picture.putpalette([0, 0, 0, 128, 0, 0])
    return picture


def transparent():
    opaque = np.where(KNOWN, 255, 0).astype(np.uint8)
    colours = np.random.default_rng(1).integers(0, 256, (*KNOWN.shape, 3), dtype=np.uint8)
    return Image.fromarray(np.dstack((colours, opaque)))


MASKS = {
    "0 and 1": grey((1, 0)),
    "0 and 255": grey((255, 0)),
    "1 bit": grey((255, 0)).convert("1"),
    "16 bits": Image.fromarray(np.where(KNOWN, 65535, 0).astype(np.uint16)),
    "palette": palette(),
    "red on black": Image.merge("RGB", (grey((255, 0)), grey((0, 0)), grey((0, 0)))),
    "holes that are transparent": transparent(),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_masks_of_two_levels_are_understood(tmp_path, name):
    MASKS[name].save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png").numpy(), KNOWN)


def test_a_mask_as_jpeg_or_array_is_understood(tmp_path):
    blocks = np.zeros((32, 32), bool)
    blocks[8:16] = True
    Image.fromarray(np.where(blocks, 255, 0).astype(np.uint8)).save(tmp_path / "mask.jpg")
    np.save(tmp_path / "mask.npy", blocks)
    torch.save(torch.from_numpy(blocks), tmp_path / "mask.pt")
    for name in ("mask.jpg", "mask.npy", "mask.pt"):
        assert np.array_equal(read_mask(tmp_path / name).numpy(), blocks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 255), "--mask must have two levels, .* got one alone"),
        (np.arange(64).reshape(8, 8) * 4, "--mask must have two levels, got 64 in"),
    ],
)
def test_other_masks_are_refused(tmp_path, values, message):
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / "mask.png")


def test_nothing_in_an_array_is_run(tmp_path):
    np.save(tmp_path / "mask.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"mask.npy must be a readable array: Object arrays"):
        read_mask(tmp_path / "mask.npy")


def test_a_kernel_is_normalised_and_centred(tmp_path, capsys):
    kernel = np.zeros((9, 12))
    kernel[1:4, 6:11] = np.outer([1, 2, 1], [1, 2, 4, 2, 1])
    np.save(tmp_path / "kernel.npy", kernel)
    read = read_kernel(tmp_path / "kernel.npy")
    expected = torch.from_numpy(np.outer([1, 2, 1], [1, 2, 4, 2, 1]) / 40).float()
    assert torch.allclose(read, expected)
    said = capsys.readouterr().out
    assert "12 x 9 pixels of sum 40, divided by it; centre of mass at 8.0, 2.0" in said
    np.save(tmp_path / "other.npy", -kernel)
    with pytest.raises(ValueError, match=r"--kernel must be .* finite numbers >= 0"):
        read_kernel(tmp_path / "other.npy")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `ncvsd solve` in `tmp_path` with few calls; return exit status, output and error."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        words = ["ncvsd", "solve", *map(str, arguments), "--nfe", "4"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


PHOTOGRAPH_OF_96 = centre_crop(read_image(PHOTOGRAPH), (96, 96))
TRUTH = PHOTOGRAPH_OF_96[..., :60, :53]


def noisy(x, sigma):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + sigma * noise).clamp(-1, 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_depth_and_opacity_come_back(run, tmp_path, bits, channels):
    truth = TRUTH if channels == 3 else TRUTH.mean(1, keepdim=True)
    alpha = torch.ones(1, 1, 60, 53) if (bits, channels) != (16, 1) else None
    write_picture(tmp_path / "in.png", Picture(noisy(truth, 0.1), bits, alpha))
    assert run("in.png", "--task", "denoise")[0] == 0
    restored = read_picture(tmp_path / "ncvsd_restored" / "in_restored.png")
    assert restored.x.shape == truth.shape
    assert restored.bits == bits
    assert (restored.alpha is None) == (alpha is None)
    assert float(psnr(restored.x, truth)) > float(psnr(noisy(truth, 0.1), truth)) + 3


def test_opacity_is_a_mask_only_where_it_hides_and_else_comes_back(run, tmp_path):
    opaque = Picture(TRUTH, 8, torch.ones(1, 1, 60, 53))
    write_picture(tmp_path / "in.png", opaque)
    status, _, err = run("in.png", "--task", "inpaint")
    assert (status, "--mask must be given for --task inpaint" in err) == (1, True)
    half = Picture(TRUTH, 8, torch.full((1, 1, 60, 53), 0.5))
    write_picture(tmp_path / "half.png", half)
    assert run("half.png", "--task", "colorize", "-o", "colours.png")[0] == 0
    assert read_picture(tmp_path / "colours.png").alpha is not None


def test_a_file_that_cannot_hold_the_result_is_refused_before_the_work(run, tmp_path, monkeypatch):
    write_picture(tmp_path / "deep.png", Picture(TRUTH, 16))
    write_picture(tmp_path / "half.png", Picture(TRUTH, 8, torch.full((1, 1, 60, 53), 0.5)))
    write_picture(tmp_path / "opaque.png", Picture(TRUTH, 8, torch.ones(1, 1, 60, 53)))
    assert run("opaque.png", "--task", "denoise", "-o", "opaque.jpg")[0] == 0
    monkeypatch.setattr("ncvsd_inverse.solve", None)  # nothing calls it
    for name, words in (("deep", "a JPEG cannot hold 16 bits"), ("half", "a JPEG cannot hold op")):
        status, _, err = run(f"{name}.png", "--task", "denoise", "-o", f"{name}.jpg")
        assert (status, words in err) == (1, True)
        assert not (tmp_path / f"{name}.json").exists()


@pytest.mark.parametrize(
    "option", [("--scale", 2), ("--blur-std", 2), ("--boundary", "valid"), ("--kernel-size", 9)]
)
def test_a_simulated_task_takes_no_model_of_the_user(run, tmp_path, option):
    write_picture(tmp_path / "in.png", Picture(TRUTH))
    status, _, err = run("in.png", "--task", "sr4x", "--simulate", *option)
    assert status == 1
    assert f"{option[0]} must come without --simulate" in err


def test_a_kernel_that_nobody_knows_is_written_beside_the_picture(run, tmp_path):
    y = noisy(GaussianBlur(1.5, 9, boundary="replicate")(PHOTOGRAPH_OF_96), 0.02)
    write_picture(tmp_path / "in.png", Picture(y))
    blind = ("--task", "deblur", "--blind", "--kernel-size", 9)
    assert run("in.png", *blind)[0] == 0
    assert run("in.png", "--task", "denoise")[0] == 0
    assert not (tmp_path / "ncvsd_restored/in_kernel.npy").exists()  # no kernel of another result
    code, text, _ = run("in.png", *blind)
    assert code == 0
    assert "pixels found, give or take" in text
    weights = np.load(tmp_path / "ncvsd_restored/in_kernel.npy")
    assert weights.shape == (9, 9)
    assert abs(weights.sum() - 1) < 1e-5
    assert read_image(tmp_path / "ncvsd_restored/in_kernel.png").shape[2:] == (72, 72)
    assert run("in.png", *blind, "--kernel-prior", "gaussian", "-o", "sharp.png")[0] == 0
    assert (tmp_path / "sharp_kernel.npy").exists()
    again = ("--task", "deblur", "--kernel", "sharp_kernel.npy", "-o", "again.png")
    assert run("in.png", *again)[0] == 0


@pytest.mark.filterwarnings("ignore:.*of the kernel lies on the rim")
def test_a_found_kernel_is_no_picture_of_the_next_run(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_picture(tmp_path / "in" / "a.png", Picture(noisy(PHOTOGRAPH_OF_96, 0.02)))
    blind = ("--task", "deblur", "--blind", "--kernel-size", 5, "--nfe", 2)
    assert run("in", *blind, "-o", "in")[0] == 0
    before = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert "a_kernel.png" in before
    assert run("in", *blind, "-o", "in")[0] == 0
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blind": True, "blur_std": 1.0}, "--kernel FILE, --blur-std S or --blind, got several"),
        ({"blind": True, "kernel_size": 8}, "--kernel-size must be odd and at least 3, got 8"),
        ({"blur_std": 1.0, "kernel_size": 9}, "--kernel-size must come with --blind"),
        ({"task": "denoise", "blind": True}, "--blind must come with --task deblur"),
    ],
)
def test_options_of_unknown_kernels_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Model(**{"task": "deblur", **options})


def test_a_photograph_that_was_blurred_before_it_was_cropped(run, tmp_path):
    whole = PHOTOGRAPH_OF_96
    blur = GaussianBlur(1.75, 13)
    y = noisy(Blur(blur.kernel, boundary="valid")(whole), 0.02)
    truth = whole[..., 6:-6, 6:-6]
    write_picture(tmp_path / "in.png", Picture(y))
    deblur = ("--task", "deblur", "--blur-std", 1.75)
    assert run("in.png", *deblur)[0] == 0
    assert run("in.png", *deblur, "--boundary", "replicate", "-o", "a.png")[0] == 0
    errors = []
    for path in ("ncvsd_restored/in_restored.png", "a.png"):
        restored = read_picture(tmp_path / path).x
        errors.append(float((restored - truth).square().mean()))
        rim = torch.ones_like(truth, dtype=torch.bool)
        rim[..., 12:-12, 12:-12] = False
        for part in (rim, ~rim):
            before, after = ((x - truth)[part].square().mean() for x in (y, restored))
            assert float(after) < 0.6 * float(before)
    assert errors[0] < 0.95 * errors[1]  # by default the scene goes on beyond the edges


def test_a_small_picture_is_enlarged_beyond_interpolation(run, tmp_path):
    truth = PHOTOGRAPH_OF_96
    write_picture(tmp_path / "in.png", Picture(SuperResolution(2)(truth)))
    status, out, _ = run("in.png", "--task", "sr", "--scale", 2)
    assert status == 0
    assert "found, give or take" in out
    y = read_picture(tmp_path / "in.png").x
    restored = read_picture(tmp_path / "ncvsd_restored" / "in_restored.png").x
    bicubic = torch.nn.functional.interpolate(y, (96, 96), mode="bicubic")
    assert float(psnr(restored, truth)) > float(psnr(bicubic, truth)) + 0.1
    # The default gives some of its PSNR for detail; a calm estimate keeps all of it.
    assert (
        run("in.png", "--task", "sr", "--scale", 2, "--temperature", 0.1, "-o", "calm.png")[0] == 0
    )
    calm = read_picture(tmp_path / "calm.png").x
    assert float(psnr(calm, truth)) > float(psnr(bicubic, truth)) + 0.3


def test_holes_that_are_transparent_are_filled(run, tmp_path):
    alpha = torch.ones(1, 1, 60, 53)
    alpha[..., 20:30, 10:30] = 0
    write_picture(tmp_path / "in.png", Picture(TRUTH * alpha, 8, alpha))
    assert run("in.png", "--task", "inpaint")[0] == 0
    restored = read_picture(tmp_path / "ncvsd_restored" / "in_restored.png")
    assert restored.alpha is None
    error = (restored.x - TRUTH).square()[..., 20:30, 10:30].mean()
    assert float(error) < 0.5 * float(TRUTH.square()[..., 20:30, 10:30].mean())


def test_masks_that_look_wrong_are_warned_of(run, tmp_path):
    known = torch.ones(60, 53, dtype=torch.bool)
    known[10:20, 10:40] = False
    write_picture(tmp_path / "in.png", Picture(torch.where(known, TRUTH, -1.0)))
    np.save(tmp_path / "inverted.npy", ~known.numpy())
    err = run("in.png", "--task", "inpaint", "--mask", "inverted.npy")[2]
    assert "warning: --mask hides 91% of the pixels" in err
    assert "is it inverted?" in err
    np.save(tmp_path / "mask.npy", known.numpy())
    assert run("in.png", "--task", "inpaint", "--mask", "mask.npy")[2] == ""
    np.save(tmp_path / "large.npy", np.eye(80) > 0)
    err = run("in.png", "--task", "inpaint", "--mask", "large.npy")[2]
    assert "--mask must have the size of the picture, 53 x 60 pixels, got 80 x 80" in err


def test_arrays_hold_what_is_no_picture(run, tmp_path):
    x = TRUTH.mean(1, keepdim=True)[..., :48, :48]
    operator = make_task("mri", 48).operator
    k_space = operator.measure(x, 0.02, generator=torch.Generator().manual_seed(0))
    torch.save(torch.view_as_complex(k_space)[0], tmp_path / "k.pt")
    assert run("k.pt", "--task", "mri")[0] == 0
    restored = read_picture(tmp_path / "ncvsd_restored" / "k_restored.png").x
    assert float(psnr(restored, x)) > 18
    counts = np.random.default_rng(0).poisson(30 * (x[0, 0].numpy() + 1) / 2)
    np.save(tmp_path / "counts.npy", counts.astype(np.uint16))
    assert run("counts.npy", "--task", "poisson", "--peak", 30)[0] == 0
    restored = read_picture(tmp_path / "ncvsd_restored" / "counts_restored.png").x
    before = torch.from_numpy(counts / 15 - 1)[None, None].float()
    assert float(psnr(restored, x)) > float(psnr(before, x)) + 3
    status, _, err = run("counts.npy", "--task", "phase_retrieval", "--prior", "ncvsd_faces64")
    assert status == 1
    assert "it must have 128 x 128 pixels" in err


def test_options_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match="--peak must come with --task poisson, got denoise"):
        Model("denoise", peak=3.0)
    with pytest.raises(ValueError, match=r"--task must be one of denoise, deblur, .* got 'blur'"):
        Model("blur")


def test_arrays_are_bounded(tmp_path):
    torch.save(torch.zeros(2**20), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    torch.save(torch.zeros(1).expand(2**20, 2**20), tmp_path / "expanded.pt")
    np.save(tmp_path / "sparse.npy", np.zeros(8))
    os.truncate(tmp_path / "sparse.npy", 2**31)
    header = io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**24)}
    np.lib.format.write_array_header_1_0(header, described)
    (tmp_path / "claims.NPY").write_bytes(header.getvalue())
    os.mkfifo(tmp_path / "pipe.npy")
    for name, reason in (
        ("bomb.pt", "must be stored, not compressed"),
        ("expanded.pt", "must lie within its storage"),
        ("sparse.npy", "it must have at most 1073741824 bytes"),
        ("claims.NPY", ""),
        ("pipe.npy", "it must be a file"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be a readable array: .*{reason}"):
            read_array(tmp_path / name)
