import math
import time
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.ndimage import gaussian_filter

from ncvsd_inverse import metrics
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.images import read_image, read_images
from ncvsd_inverse.numerics import Moments, frechet_distance


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


def test_lpips_of_alexnet_needs_no_download(data_folder, weights_folder, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    folder = data_folder / "lpips_reference"
    images = [read_image(folder / f"{name}.png") for name in ("ex_p0", "ex_p1", "ex_ref")]
    x, reference = torch.cat(images[:2]), images[2].expand(2, -1, -1, -1)
    exact = metrics.lpips(x, reference)
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    for folder in (None, tmp_path):
        if folder is None:
            monkeypatch.delenv("NCVSD_WEIGHTS")
        else:
            monkeypatch.setenv("NCVSD_WEIGHTS", str(folder))
        shipped = metrics.lpips(x, reference)
        assert not torch.equal(shipped, exact)
        assert torch.allclose(shipped, exact, rtol=0, atol=2e-4)


def test_lpips_says_which_weights_are_missing(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
    x = torch.zeros(1, 3, 64, 64)
    for net in ("squeeze", "vgg"):
        message = (
            rf"lpips_{net}_features\.safetensors .*NCVSD_WEIGHTS .*{tmp_path}.*no network.*to make"
        )
        with pytest.raises(CheckpointError, match=message):
            metrics.lpips(x, x, net=net)
    (tmp_path / "lpips_alex_features.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="NCVSD_WEIGHTS"):
        metrics.lpips(x, x)


def test_lpips_of_vgg_is_piqs(tmp_path, monkeypatch, generator):
    """With any weights of the backbone: those of the published metric may not be here."""
    from lpips import LPIPS
    from piq.perceptual import ContentLoss
    from safetensors.torch import save_file
    from torchvision.models import vgg16

    with torch.device("meta"):
        network = vgg16(weights=None).features
    network.to_empty(device="cpu")
    for weight in network.parameters():
        fan_in = weight[0].numel()
        torch.nn.init.normal_(weight, std=(2 / fan_in) ** 0.5, generator=generator)
    features = {f"features.{name}": value for name, value in network.state_dict().items()}
    save_file(features, tmp_path / "lpips_vgg_features.safetensors")
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
    reference = torch.rand(2, 3, 40, 33, generator=generator) * 2.4 - 1.2
    x = reference + 0.3 * torch.randn(reference.shape, generator=generator)
    measured = metrics.lpips(x, reference, net="vgg")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = LPIPS(net="vgg", pnet_rand=True, verbose=False).lins
    theirs = ContentLoss(
        network,
        layers=("3", "8", "15", "22", "29"),
        weights=[layer.model[-1].weight.detach() for layer in linear],
        normalize_features=True,
        reduction="none",
    )
    theirs.model = theirs.replace_pooling(theirs.model)
    unit = [(images.clamp(-1, 1) + 1) / 2 for images in (x, reference)]
    assert torch.allclose(measured, theirs(*unit), rtol=1e-4)


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
        ("crps", torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 3, 8, 8), "draws must have shape"),
        ("crps", torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), "draws must have shape"),
        ("crps", torch.zeros(2, 2, 3, 8, 8), torch.zeros(1, 3, 8, 8), "draws must have shape"),
        ("crps", torch.full((2, 1, 1, 2, 2), math.nan), torch.zeros(1, 1, 2, 2), "draws must be"),
        ("coverage", torch.zeros(18, 1, 3, 8, 8), torch.zeros(1, 3, 8, 8), "draws must .* 19, B"),
    ],
)
def test_bad_images_name_the_argument(metric, x, reference, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, metric)(x, reference)


def test_unknown_backbone():
    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="net must be one of alex, squeeze, vgg, got 'vg'"):
        metrics.lpips(x, x, net="vg")


@pytest.mark.parametrize("num", [2, 3, 40])
def test_crps_of_gaussian_draws_is_its_closed_form(num, generator):
    """The fair score of draws of N(1, 0.3^2) is that of the law itself, on average."""
    truth = torch.tensor([0.4, 1.0, 1.5], dtype=torch.float64)
    z = ((truth - 1) / 0.3).numpy()
    law = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi)
    reference = truth.view(3, 1, 1, 1).expand(3, 1, 100, 300)
    eps = torch.randn(num, *reference.shape, generator=generator, dtype=torch.float64)
    # 30,000 pixels of std below 0.3 leave a standard error below 0.002.
    assert metrics.crps(1 + 0.3 * eps, reference).tolist() == pytest.approx(0.3 * law, abs=7e-3)


def test_crps_by_its_definition(generator):
    draws = torch.randn(5, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    reference = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    pairs = (draws[:, None] - draws[None]).abs().sum((0, 1)) / (5 * 4)
    expected = ((draws - reference).abs().mean(0) - pairs / 2).mean((1, 2, 3))
    assert torch.allclose(metrics.crps(draws, reference), expected)


@pytest.mark.parametrize("num", [19, 20, 26, 39])
def test_coverage_of_draws_of_the_truths_own_law(num, generator):
    """0.9 for any law and number of draws; too narrow draws cover less, as do too few."""
    eps = torch.randn(num + 1, 2, 1, 100, 300, generator=generator, dtype=torch.float64)
    skewed = (2 * eps).exp()
    # 30,000 pixels leave a standard error below 0.002.
    assert metrics.coverage(skewed[1:], skewed[0]).tolist() == pytest.approx([0.9, 0.9], abs=0.008)
    narrow = metrics.coverage(0.5 * eps[1:], eps[0])
    # Of a normal truth, 1.645 / 2 stds of either side hold 59%; few draws spread a little wider.
    assert narrow.tolist() == pytest.approx([0.59, 0.59], abs=0.04)


def test_coverage_counts_pixels():
    draws = torch.linspace(-0.9, 0.9, 19).view(19, 1, 1, 1, 1).expand(19, 1, 1, 2, 2)
    reference = torch.tensor([[-1.0, -0.9], [0.0, 0.95]]).view(1, 1, 2, 2)
    assert metrics.coverage(draws, reference).tolist() == [0.5]


def test_frechet_distance_of_diagonal_gaussians():
    """Rows whose moments are known: +-a along each axis about a mean."""

    def rows(mean, stds):
        # 2 D rows, of which one pair differs in each number: variance 2 a^2 / (2 D - 1).
        mean, stds = torch.tensor(mean), torch.tensor(stds)
        steps = torch.diag(stds * math.sqrt((2 * len(stds) - 1) / 2))
        return torch.cat([mean + steps, mean - steps])

    first = Moments.of(rows([0.0, 1.0, 5.0], [1.0, 2.0, 0.5]))
    second = Moments.of(rows([0.5, 1.0, 3.0], [1.5, 2.0, 0.0]))
    assert first.covariance.diagonal().tolist() == pytest.approx([1, 4, 0.25])
    # |difference of means|^2 + |difference of stds|^2
    expected = 0.5**2 + 2**2 + 0.5**2 + 0.5**2
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-5)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-5)


def correlated(num, dim, seed):
    source = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, dim, generator=source)
    return torch.randn(num, dim, generator=source) @ factor + torch.randn(dim, generator=source)


def test_frechet_distance_against_scipy():
    first, second = Moments.of(correlated(50, 7, 0)), Moments.of(correlated(80, 7, 1))
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy())
    expected = (first.mean - second.mean).square().sum()
    expected += first.covariance.trace() + second.covariance.trace() - 2 * np.trace(root).real
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("num", [5, 100])
def test_frechet_distance_of_equal_and_of_shifted_sets(num):
    """Also of fewer rows than numbers in each, whose covariance is singular."""
    rows = correlated(num, 20, 0).double()
    moments = Moments.of(rows)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-8)
    shifted = Moments.of(rows + torch.linspace(0, 1, 20).double())
    squares = float(torch.linspace(0, 1, 20).double().square().sum())
    assert frechet_distance(moments, shifted) == pytest.approx(squares, rel=1e-9)


def test_moments_add_up():
    rows = correlated(100, 6, 0) + 50
    parts = sum((Moments.of(part) for part in rows.split(17)), Moments.none())
    assert parts.count == 100
    assert torch.allclose(parts.mean, rows.double().mean(0))
    assert torch.allclose(parts.covariance, torch.cov(rows.double().T), rtol=1e-9)


def test_frechet_distance_refuses_what_has_no_moments():
    two, longer = Moments.of(torch.eye(2)), Moments.of(torch.eye(3))
    with pytest.raises(ValueError, match="first must be moments of at least 2 rows, got 1"):
        frechet_distance(Moments.of(torch.ones(1, 2)), two)
    with pytest.raises(ValueError, match="second must be moments of at least 2 rows, got 0"):
        frechet_distance(two, Moments.none())
    with pytest.raises(ValueError, match="second must have rows of length 2, got 3"):
        frechet_distance(two, longer)


def test_alex_features_are_torchvisions(weights_folder, generator):
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    x = torch.rand(2, 3, 64, 48, generator=generator) * 2.4 - 1.2
    network = alexnet(weights=None).eval()
    state = load_file(weights_folder / "lpips_alex_features.safetensors")
    network.load_state_dict(state, strict=False)
    # ImageNet's means and stds of [0, 1], rounded as the LPIPS package does for [-1, 1].
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    with torch.no_grad():
        expected = network.features[:12]((x.clamp(-1, 1) - shift) / scale).mean((2, 3))
    features = metrics.alex_features(x)
    assert features.shape == (2, 256)
    assert torch.allclose(features, expected, atol=1e-5)
    assert torch.equal(metrics.alex_features(x.double()), features)
    assert metrics.alex_features(torch.zeros(1, 3, 32, 32)).shape == (1, 256)


def test_fd_alex_grows_with_damage(weights_folder, data_folder, generator):
    faces = torch.cat(list(read_images(data_folder / "faces64" / "val.zip")))
    first, second = faces[::2], faces[1::2]
    chance = metrics.fd_alex([second], first.split(50))
    eps = torch.randn(second.shape, generator=generator)
    noisy = [metrics.fd_alex([second + std * eps], [first]) for std in (0.05, 0.1, 0.2)]
    # Chance is most of the first: 128 images have few directions of 256.
    assert 0 < chance < noisy[0] < noisy[1] / 1.5 < noisy[2] / 4
    assert metrics.fd_alex([first], first.split(30)) == pytest.approx(0, abs=1e-3)


def test_alex_features_refuse_other_images():
    with pytest.raises(ValueError, match="x must be at least 32 pixels high and wide"):
        metrics.alex_features(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match="x must have 3 channels for AlexNet"):
        metrics.alex_features(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="x must be finite"):
        metrics.alex_features(torch.full((1, 3, 64, 64), math.nan))


@pytest.fixture
def any_lpips(monkeypatch):
    """Stand in for LPIPS, whose weights may not be here, with convolutions; count the loads."""
    loads = []

    class Distance(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False)
            fill = torch.arange(108, dtype=torch.float32).view(4, 3, 3, 3)
            self.layer.weight.copy_((fill / 7).sin())

        def forward(self, x, reference):
            apart = self.layer(x) - self.layer(reference)
            return apart.square().mean((1, 2, 3), keepdim=True)

    def load(net, folder):
        loads.append(net)
        time.sleep(0.02)
        return Distance()

    monkeypatch.setattr(metrics, "_networks", {})
    monkeypatch.setattr(metrics, "_load_lpips", load)
    return loads


def all_metrics(x, reference):
    draws = torch.stack([x + 0.01 * place for place in range(20)])
    return {
        "psnr": metrics.psnr(x, reference),
        "ssim": metrics.ssim(x, reference),
        "lpips": metrics.lpips(x, reference),
        "crps": metrics.crps(draws, reference),
        "coverage": metrics.coverage(draws, reference),
    }


def test_metrics_do_not_depend_on_the_callers_arithmetic(arithmetic, pair, any_lpips):
    expected = all_metrics(*pair)
    metrics._networks.clear()
    with arithmetic():
        found = all_metrics(*pair)
    for name, values in expected.items():
        assert values.dtype == torch.float32
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_of_reduced_precision_are_those_of_the_same_numbers(dtype, pair, any_lpips):
    x, reference = (image.to(dtype) for image in pair)
    draws = torch.stack([x + 0.01 * place for place in range(20)])
    for metric in (metrics.psnr, metrics.ssim, metrics.lpips):
        assert torch.equal(metric(x, reference), metric(x.float(), reference.float()))
        assert torch.equal(metric(x, pair[1]), metric(x.float(), pair[1]))
    for metric in (metrics.crps, metrics.coverage):
        assert torch.equal(metric(draws, reference), metric(draws.float(), reference.float()))


@pytest.mark.parametrize("decibel", [10.0, 60.0, 75.0, 79.9])
def test_psnr_is_exact_up_to_its_cap(decibel):
    reference = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x = reference + 2 * 10 ** (-decibel / 20)
    assert float(metrics.psnr(x, reference)) == pytest.approx(decibel, abs=1e-9)
    assert float(metrics.psnr(x.float(), reference.float())) == pytest.approx(decibel, abs=1e-2)
    assert float(metrics.psnr(reference + 1e-5, reference)) == 80.0


def test_threads_load_a_network_once(at_once, pair, any_lpips):
    alone = metrics.lpips(*pair)
    metrics._networks.clear()
    any_lpips.clear()
    assert all(torch.equal(found, alone) for found in at_once([lambda: metrics.lpips(*pair)] * 8))
    assert any_lpips == ["alex"]
