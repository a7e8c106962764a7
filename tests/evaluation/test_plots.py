import subprocess
import sys

import pytest
import torch

from ncvsd_inverse.evaluation import plots
from ncvsd_inverse.evaluation.plots import COLUMNS, GridRow, save_evaluation_plot, save_picture_grid
from ncvsd_inverse.evaluation.posterior import Figure, LevelFigures, PosteriorRatio
from ncvsd_inverse.images import read_image


def row(generator, std=True, channels=3):
    truth = torch.rand(1, channels, 16, 24, generator=generator) * 2 - 1
    return GridRow(
        title="sr4x",
        truth=truth,
        measurement=truth[..., ::4, ::4],
        estimate=truth,
        std=truth.abs() if std else None,
        psnr=23.4,
    )


def test_grid_has_a_row_a_result(tmp_path, generator):
    one = [row(generator)]
    save_picture_grid(tmp_path / "one.png", one)
    save_picture_grid(
        tmp_path / "three.png", [*one, row(generator, False), row(generator, True, 1)]
    )
    small, large = read_image(tmp_path / "one.png"), read_image(tmp_path / "three.png")
    assert large.shape[-2] > 2.5 * small.shape[-2]
    assert large.shape[-1] == small.shape[-1]


def test_std_is_shown_against_the_largest_of_the_grid(tmp_path, generator):
    calm, wild = row(generator), row(generator)
    calm.std.fill_(0.1)
    wild.std.fill_(0.4)
    save_picture_grid(tmp_path / "a.png", [calm, wild])
    x = read_image(tmp_path / "a.png")
    height, width = x.shape[-2:]
    column = round(width * (len(COLUMNS) - 0.5) / len(COLUMNS))
    first, second = (float(x[0, 0, round(height * at), column]) for at in (0.3, 0.75))
    assert second == 1
    assert first == pytest.approx(-0.5, abs=0.01)


def test_bad_rows_write_nothing(tmp_path, generator):
    with pytest.raises(ValueError, match="rows must hold at least one"):
        save_picture_grid(tmp_path / "a.png", [])
    good = row(generator)
    bad = GridRow("x", torch.zeros(2, 3, 8, 8), good.measurement, good.estimate, None, 0.0)
    with pytest.raises(ValueError, match="picture must have shape"):
        save_picture_grid(tmp_path / "a.png", [good, bad])
    assert list(tmp_path.iterdir()) == []


def test_no_window_system_is_touched(tmp_path):
    code = (
        "import sys, torch\n"
        "from ncvsd_inverse.evaluation.plots import GridRow, save_picture_grid\n"
        "x = torch.zeros(1, 3, 8, 8)\n"
        f"save_picture_grid({str(tmp_path / 'a.png')!r}, [GridRow('a', x, x, x, None, 1.0)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def level(sigma, ratio, teacher=None):
    def parts(value):
        values = (value, 0.9, 0.1, value - 2)
        return PosteriorRatio(*(Figure(each, 0.05) for each in values))

    return LevelFigures(
        sigma=sigma,
        teacher_psnr=Figure(30 - sigma, 0.2),
        prior=parts(ratio),
        mean_psnr=Figure(29 - sigma, 0.2),
        psnr_gap=Figure(1.0, 0.1),
        crps=Figure(0.1 * sigma, 0.01),
        teacher=None if teacher is None else parts(teacher),
    )


def test_figures_are_plotted_over_sigma_beside_what_is_right():
    levels = [level(0.1, 1.8, 1.5), level(1.0, 2.1, 1.6)]
    ratio, parts, psnr, _ = plots._plot_levels(levels).axes
    drawn = [list(line.get_ydata()) for line in ratio.get_lines()]
    assert [1.8, 2.1] in drawn
    assert [1.5, 1.6] in drawn
    assert [2, 2] in drawn
    assert [0.9, 0.9] in [list(line.get_ydata()) for line in parts.get_lines()]
    references = [float(line.get_ydata()[0]) for line in parts.get_lines() if dotted(line)]
    assert sorted(references) == [0, 1]
    assert [29.9, 29.0] in [list(line.get_ydata()) for line in psnr.get_lines()]
    assert ratio.get_xscale() == "log"
    assert [text.get_text() for text in ratio.get_legend().get_texts()] == [
        "prior",
        "teacher's diffusion",
    ]


def dotted(line):
    return line.get_linestyle() == ":"


def test_evaluation_plot_is_a_picture(tmp_path):
    save_evaluation_plot(tmp_path / "a.png", [level(2.0, 1.9), level(0.5, 2.0)])
    assert read_image(tmp_path / "a.png").shape[-1] > 500
    with pytest.raises(ValueError, match="levels must hold at least one level, got none"):
        save_evaluation_plot(tmp_path / "b.png", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
