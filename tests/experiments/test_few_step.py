"""Few-step draws beside exact posteriors: experiments/few_step/oracle.py, shortened."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from experiments.few_step.oracle import (
    ORDERS,
    Mixture,
    Plan,
    Posterior,
    calibrate,
    gaussian,
    gaussian_distance,
    measure_distances,
    mixture,
    pose,
    report,
    sliced_distance,
    tasks,
    uniform_p_value,
)
from experiments.few_step.point import (
    LIVELY,
    best_of,
    calmest_of,
    scores,
    search,
    write_card,
)
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.priors.files import PACKAGE_WEIGHTS, card_path, read_card
from ncvsd_inverse.protocols import SIGMA_Y, Point
from ncvsd_inverse.sampling.matheron import Matheron

CHAINS = 400
NAMES = ["box inpainting", "random inpainting", "SR", "blur"]


@pytest.fixture(scope="module")
def line():
    return gaussian(8)


@pytest.fixture(scope="module")
def mixed():
    return mixture(8, draws=1024)


def problem(oracle, name, num, seed=0):
    operator = next(op for task, op in tasks(oracle).items() if task.startswith(name))
    return pose(oracle, operator, num, seed=seed)


def two_bumps():
    """A mixture of two Gaussians of three numbers."""
    root = torch.tensor([[1.0, 0, 0], [0.5, 0.8, 0], [-0.3, 0.2, 0.5]]).double()
    return Mixture.of(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-1.0, 0, 0.5], [0.7, 1, 0]]),
        torch.stack([root @ root.T, 0.3 * torch.eye(3).double()]),
    )


def test_posterior_of_a_mixture_is_that_of_weighted_draws():
    law, source = two_bumps(), torch.Generator().manual_seed(0)
    matrix = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.4, -1]]).double()
    y = torch.tensor([0.2, 0.3]).double()
    x = law.draw(200_000, source)
    log_likelihood = -(y - x @ matrix.T).square().sum(1) / (2 * 0.5**2)
    weights = log_likelihood.softmax(0)
    mean = weights @ x
    covariance = torch.einsum("n,ni,nj->ij", weights, x - mean, x - mean)
    own_mean, own_covariance = Posterior(law, matrix, 0.5).given(y).moments()
    # The weights are worth about 60 000 draws of std up to 1: four errors are 0.016.
    assert torch.allclose(own_mean, mean, atol=0.02)
    assert torch.allclose(own_covariance, covariance, atol=0.03)


def test_draws_of_a_mixture_have_its_moments():
    law = two_bumps()
    x = law.draw(100_000, torch.Generator().manual_seed(0))
    mean, covariance = law.moments()
    # Four errors of 100 000 draws of std up to 1.3.
    assert torch.allclose(x.mean(0), mean, atol=0.017)
    assert torch.allclose(torch.cov(x.T), covariance, atol=0.03)


def test_distances_of_a_shift_are_its_length():
    law = Mixture.of(torch.ones(1), torch.zeros(1, 3), torch.eye(3).double()[None])
    x = law.draw(5000, torch.Generator().manual_seed(0))
    shift = torch.tensor([0.6, 0, 0.8]).double()
    # 5000 draws know a mean to 0.014 and the shift is 1 / sqrt(3) total stds.
    assert gaussian_distance(x + shift, law) == pytest.approx(1 / 3**0.5, abs=0.03)
    # Projections of the shift have mean square 1 / 3; 200 directions know it to 10%.
    assert sliced_distance(x + shift, x, law) == pytest.approx(1 / 3**0.5, rel=0.1)
    assert sliced_distance(x, x.flip(0), law) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_conditioning_is_exact_with_a_gaussian_prior(line, name):
    plan = Plan({"conditioning": (1, 4), "gibbs": (4,)}, {4: 1.5})
    one, four, gibbs = measure_distances(problem(line, name, 2), name, plan, chains=CHAINS)
    # Distance and floor are of as many draws; over two measurements they agree to about 5%.
    assert one.ratio < 1.2
    assert four.ratio < 1.2
    assert gibbs.ratio > 1.15


def test_distance_sees_a_covariance_that_is_wrong(line, monkeypatch):
    whole = SpectralCovariance.__init__

    def white(self, mixing, spectrum, width):
        # A factor would not do: pixels that are known almost exactly are interpolated alike.
        whole(self, mixing, spectrum.mean().expand_as(spectrum), width)

    monkeypatch.setattr(SpectralCovariance, "__init__", white)
    plan = Plan({"conditioning": (4,)}, {})
    (row,) = measure_distances(problem(line, "random inpainting", 2), "random", plan, chains=CHAINS)
    assert row.ratio > 1.3


def test_mixture_comes_nearer_with_more_calls(mixed):
    plan = Plan({"conditioning": (2, 20), "gibbs": (20,)}, {})
    posed = problem(mixed, "box inpainting", 2)
    two, twenty, gibbs = measure_distances(posed, "box", plan, chains=CHAINS, long=20)
    assert two.measurements == twenty.measurements == 2
    assert twenty.distance < 0.6 * two.distance
    assert gibbs.distance < two.distance


def test_gaussian_intervals_are_calibrated(line):
    row = calibrate(problem(line, "box inpainting", 100, seed=1), "box", "conditioning", 4)
    for wanted in ORDERS:
        # 100 truths of 64 pixels know a coverage to the printed error.
        assert abs(row.coverage[wanted] - wanted) < max(4 * row.coverage_error[wanted], 0.5)
        assert row.coverage_error[wanted] < 1
    assert min(row.p_values.values()) > 1e-3


def test_exact_draws_of_a_mixture_are_calibrated(mixed):
    row = calibrate(problem(mixed, "random inpainting", 150, seed=1), "random", "exact", 0)
    for wanted in ORDERS:
        assert abs(row.coverage[wanted] - wanted) < 4 * row.coverage_error[wanted]
    assert min(row.p_values.values()) > 1e-3


def test_ranks_of_the_likelihood_see_noise_that_was_dropped(line, monkeypatch):
    draw = Matheron.draw

    def cool(self, x, covariance, **options):
        return draw(self, x, covariance, **{**options, "temperature": 0.0})

    monkeypatch.setattr(Matheron, "draw", cool)
    row = calibrate(problem(line, "blur", 100, seed=1), "blur", "conditioning", 4)
    assert row.p_values["likelihood"] < 1e-3


def test_calibration_sees_means_in_place_of_draws(line, monkeypatch):
    def mean(self, u, sigma, *, generator=None):
        return self.denoise(u, sigma)

    monkeypatch.setattr(GaussianPrior, "sample", mean)
    row = calibrate(problem(line, "blur", 100, seed=1), "blur", "conditioning", 4)
    assert row.worst > 2
    assert min(row.p_values.values()) < 1e-3


def test_ranks_that_pile_up_are_not_uniform():
    even = torch.arange(400) % 40
    assert uniform_p_value(even) == pytest.approx(1)
    assert uniform_p_value(even // 2) < 1e-6


def test_noise_is_on_measured_numbers_only(line):
    posed = problem(line, "box inpainting", 50)
    noise = (posed.y - posed.operator(posed.x0)).flatten(1)
    assert noise[:, ~posed.seen].abs().max() == 0
    # 50 x 48 draws know a std to 1.5%.
    assert float(noise[:, posed.seen].std()) == pytest.approx(SIGMA_Y, rel=0.06)


def test_report_tells_goals_that_are_missed(line):
    plan = Plan({"conditioning": (2,)}, {2: 1.5})
    posed = problem(line, "blur", 2)
    rows = measure_distances(posed, "blur", plan, chains=100)
    missed = replace(rows[0], distance=2 * rows[0].floor)
    calibration = [calibrate(posed, "blur", "exact", 0)]
    page = report("command", [*rows, missed], calibration)
    assert "| 1.5: yes |" in page
    assert "| 2.00 | 1.5: no |" in page


START = Point(temperature=0.5, noise=0.7, first=3.0, smallest=0.05, last=0.03)


def walk(row, trials, calls=10, tie=1.0):
    """Go on with a search whose best is at a temperature of 0.15, a last level of 0.1 and so on."""
    best = Point(temperature=0.15, noise=0.7, first=0.75, smallest=0.05, last=0.1)
    for settings in search(calls, START, row, trials, tie):
        distance = sum(abs(math.log(settings[name] / getattr(best, name))) for name in settings)
        row.append({**settings, "score": math.exp(0.1 * distance)})
    return row


def test_a_search_of_settings_finds_the_best_and_goes_on_where_it_stopped():
    row = walk([], 30)
    assert row[0] == {**START._asdict(), "score": row[0]["score"]}
    assert row[1] == {**START._asdict(), **LIVELY, "score": row[1]["score"]}
    found = best_of(row)
    assert (found.last, found.first, found.smallest) == (0.1, 0.75, 0.05)
    assert found.noise == pytest.approx(0.7, rel=0.1)
    assert found.temperature == pytest.approx(0.15, rel=0.3)
    assert len(scores(row)) == len(row) == 30  # a calmer one was among them
    again = walk(walk([], 9), 30)
    assert len(scores(again)) == len(again)
    assert scores(row).items() <= scores(again).items()


def test_a_search_ends_with_calmer_settings_that_tie():
    row = walk([], 30, tie=1.1)
    best = best_of(row)
    calmer = [scores([trial]).popitem()[0] for trial in row[30:]]
    assert len(calmer) > 1
    assert all(point._replace(temperature=best.temperature) == best for point in calmer)
    assert [point.temperature for point in calmer] == sorted(
        (point.temperature for point in calmer), reverse=True
    )


def test_settings_that_were_found_go_into_the_card(tmp_path, monkeypatch):
    known = card_path(PACKAGE_WEIGHTS / "ncvsd_faces64")
    shutil.copy(known, tmp_path)
    monkeypatch.setattr("experiments.few_step.point.PACKAGE_WEIGHTS", tmp_path)
    trials = {"blur": {"4": walk([], 5)}, "other": {"7": walk([], 2)}}
    write_card("ncvsd_faces64", trials, 1.002)
    before, after = read_card(known.with_suffix("")), read_card(tmp_path / "ncvsd_faces64")
    assert after.points["blur"] == {
        **before.points["blur"],
        4: calmest_of(trials["blur"]["4"], 1.002),
    }
    assert after.points[None][7] == calmest_of(trials["other"]["7"], 1.002)
    assert list(after.points[None]) == sorted(after.points[None])
    assert after.points["superres"] == before.points["superres"]
    assert replace(after, points=None) == replace(before, points=None)


def test_of_settings_that_tie_the_calmest_are_taken():
    rows = [(0.5, 0.7, 1.0), (0.2, 0.7, 1.0015), (0.2, 0.5, 1.001), (0.1, 0.7, 1.05)]
    trials = [
        {**START._asdict(), "temperature": t, "noise": noise, "score": score}
        for t, noise, score in rows
    ]
    found = calmest_of(trials, 1.002)
    assert (found.temperature, found.noise) == (0.2, 0.5)
    assert best_of(trials).temperature == 0.5
    assert calmest_of(trials, 1.05).temperature == 0.1
