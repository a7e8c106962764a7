"""Distillation of a teacher whose posterior is known: experiments/oracle, shortened."""

from dataclasses import replace

import pytest
import torch

from experiments.oracle.distillation import Draws, distil, images, judge, points, squared_distance

FEW = {"pairs": 2000, "views": 8, "draws": 500}


def shortened(case, steps, gamma):
    num = steps * case.config.batch_size
    return replace(
        case, config=replace(case.config, images=num, adversarial_images=num, gamma=gamma)
    )


def test_distance_is_that_of_sorted_projections():
    source = torch.Generator().manual_seed(0)
    b = torch.randn(4000, 1, 2, 1, generator=source)
    shift = torch.tensor([0.3, -0.4]).reshape(1, 2, 1)
    # Scaling and shifting keep the order: the best pairing moves x to 2 x + shift.
    a = (2 * b + shift)[torch.randperm(4000, generator=source)]
    # (1 + 0.25 / 2) / 1 in the limit; 4000 points know a variance to 2%.
    assert squared_distance(a, b) == pytest.approx(1.125, rel=0.06)
    assert squared_distance(b, b.flip(0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [points, images])
def test_exact_draws_are_judged_exact_and_means_are_not(make):
    case = make()

    def exact(x, sigma, y, y_sigma):
        return case.prior.sample(y, y_sigma)

    def mean(x, sigma, y, y_sigma):
        return case.prior.denoise(y, y_sigma)

    torch.manual_seed(0)
    for sigma in case.levels:
        row = judge(case, exact, sigma, **FEW)
        assert abs(row.ratio - 2) < 4 * row.ratio_error
        assert abs(row.variance - 1) < 0.05  # 2000 pairs resolve it to about 0.01
        assert abs(row.bias) < 0.05
        # Each of the two is known to its standard error, and they share a set of draws.
        assert abs(row.distance - row.floor) < 4 * (row.distance_error + row.floor_error)
        assert row.distance < 2 * row.floor
        row = judge(case, mean, sigma, **FEW)
        assert row.ratio == pytest.approx(1, abs=1e-4)
        assert row.variance == row.bias == pytest.approx(0, abs=1e-6)
        assert 0.9 < row.distance < 1.1  # a point is one posterior std away from its posterior
        assert not row.holds


@pytest.mark.parametrize("make", [points, images])
def test_posteriors_are_torn_between_components(make):
    case = make()
    rows = [judge(case, lambda x, *_: x, sigma, **FEW) for sigma in case.levels]
    assert max(row.torn for row in rows) > 0.3


def test_a_stack_is_denoised_as_its_parts_are():
    data = Draws(points().prior, stack=4)
    batch = next(data.batches(0, 6, seed=0)).images
    assert batch.shape == (6, *data.image_shape) == (6, 8, 1, 1)
    sigma = torch.linspace(0.5, 3, 6)
    parts = batch.reshape(6, 4, 2, 1, 1)
    means = torch.stack([data.prior.denoise(parts[:, k], sigma) for k in range(4)], 1)
    assert torch.equal(data.denoise(batch, sigma), means.reshape(batch.shape))
    later = data.batches(0, 6, seed=0)
    next(later)
    assert torch.equal(next(later).images, next(data.batches(1, 6, seed=0)).images)
    assert torch.equal(next(data.batches(0, 6, seed=0, rows=slice(2, 4))).images, batch[2:4])


@pytest.mark.slow
def test_a_mixture_is_distilled_to_its_known_posterior():
    torch.set_num_threads(1)
    case = shortened(points(), steps=6000, gamma=0.414)
    network = distil(case)
    # Lower levels take longer to arrive, see the experiment.
    for sigma in (1.5, 2.0, 3.0):
        row = judge(case, network, sigma, pairs=20_000, views=32, draws=1000)
        # Ratio within 1.95 to 2.05, distance within twice the Monte-Carlo floor.
        assert row.holds, row


def test_without_extra_noise_the_student_collapses():
    torch.set_num_threads(1)
    case = shortened(points(), steps=400, gamma=0.0)
    network = distil(case)
    for sigma in case.levels:
        row = judge(case, network, sigma, **FEW)
        assert row.variance == 0
        assert row.ratio < 1.7
        assert row.distance > 5 * row.floor
