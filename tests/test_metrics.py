import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ncvsd_inverse import metrics
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.images import read_image


@pytest.fixture
def pair(generator):
    reference = torch.rand(2, 3, 40, 33, generator=generator) * 2 - 1
    return reference + 0.1 * torch.randn(reference.shape, generator=generator), reference


def test_psnr_is_the_mean_square_in_decibels(pair):
    x, reference = pair
    error = (x.clamp(-1, 1) - reference).square().flatten(1).mean(1)
    assert torch.allclose(metrics.psnr(x, reference), 10 * torch.log10(4 / error), atol=1e-3)
    shifted = torch.zeros(1, 1, 8, 8)
    assert float(metrics.psnr(shifted + 0.2, shifted)) == pytest.approx(20.0, abs=1e-3)
    assert float(metrics.psnr(reference, reference)[0]) == pytest.approx(80.0, abs=1e-3)


def reference_ssim(x, reference):
    """Mean SSIM of one plane in [0, 1] where the window of 11 pixels fits, in numpy and scipy."""

    def blur(plane):
        # truncate = 5 / 1.5 gives the window of 11 pixels.
        return gaussian_filter(plane, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    mean_x, mean_r = blur(x), blur(reference)
    var_x, var_r = blur(x * x) - mean_x**2, blur(reference * reference) - mean_r**2
    covariance = blur(x * reference) - mean_x * mean_r
    structure = (2 * covariance + 0.03**2) / (var_x + var_r + 0.03**2)
    return np.mean((2 * mean_x * mean_r + 0.01**2) / (mean_x**2 + mean_r**2 + 0.01**2) * structure)


def test_ssim_against_its_formula(pair):
    x, reference = pair
    planes = [((image.clamp(-1, 1) + 1) / 2).double().numpy() for image in (x, reference)]
    expected = [
        np.mean([reference_ssim(*channel) for channel in zip(*pair, strict=True)])
        for pair in zip(*planes, strict=True)
    ]
    assert metrics.ssim(x, reference).tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(metrics.ssim(reference, reference), torch.ones(2))


def test_ssim_of_large_images_is_at_their_own_size(generator):
    reference = torch.rand(1, 1, 400, 390, generator=generator) * 2 - 1
    x = (reference + 0.3 * torch.randn(reference.shape, generator=generator)).clamp(-1, 1)
    expected = reference_ssim(
        *[((image[0, 0] + 1) / 2).double().numpy() for image in (x, reference)]
    )
    assert float(metrics.ssim(x, reference)) == pytest.approx(expected, abs=1e-4)


def test_metrics_do_not_mix_images(pair):
    x, reference = pair
    for metric in (metrics.psnr, metrics.ssim):
        alone = metric(x[1:], reference[1:])
        assert torch.allclose(metric(x, reference)[1:], alone, atol=1e-5)


def test_lpips_of_the_published_pair(data_folder, weights_folder):
    folder = data_folder / "lpips_reference"
    reference, first, second = (
        read_image(folder / f"{name}.png") for name in ("ex_ref", "ex_p0", "ex_p1")
    )
    # Three figures are published for these images.
    assert float(metrics.lpips(first, reference)) == pytest.approx(0.722, abs=1e-3)
    assert float(metrics.lpips(second, reference)) == pytest.approx(0.138, abs=1e-3)
    both = metrics.lpips(torch.cat([first, second]), torch.cat([reference, reference]))
    assert both.tolist() == pytest.approx([0.722, 0.138], abs=1e-3)
    squeezed = metrics.lpips(second, reference, net="squeeze")
    assert 0 < float(squeezed) < float(metrics.lpips(first, reference, net="squeeze"))


def test_lpips_says_which_weights_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(CheckpointError, match=r"NCVSD_WEIGHTS .*lpips_alex_features\.safetensors"):
        metrics.lpips(x, x)
    (tmp_path / "lpips_alex_features.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="NCVSD_WEIGHTS"):
        metrics.lpips(x, x)


def test_lpips_refuses_other_weights(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "lpips_alex_features.safetensors")
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(CheckpointError, match="must hold torchvision's features"):
        metrics.lpips(x, x)


@pytest.mark.parametrize(
    ("metric", "x", "reference", "message"),
    [
        ("psnr", torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8), "reference must have shape"),
        ("psnr", torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), "x must have shape"),
        ("psnr", torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8), "x must be finite"),
        ("ssim", torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20), "x must be at least 11"),
        ("lpips", torch.zeros(1, 3, 31, 64), torch.zeros(1, 3, 31, 64), "x must be at least 32"),
        ("lpips", torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64), "x must have 3 channels"),
    ],
)
def test_bad_images_name_the_argument(metric, x, reference, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, metric)(x, reference)


def test_unknown_backbone():
    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="net must be one of alex, squeeze, got 'vgg'"):
        metrics.lpips(x, x, net="vgg")
