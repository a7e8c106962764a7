"""The crops that training on one GPU takes from pictures in its memory."""

import numpy as np
import torch

from experiments.one_gpu import train


def picture(height, width, blue):
    """Return a picture whose red tells the row, whose green the column, and whose blue itself."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, blue)], -1).astype(np.uint8)


def test_crops_are_windows_of_the_pictures_or_their_mirror_images():
    torch.manual_seed(0)
    sizes = {10: (70, 90), 20: (64, 64), 30: (100, 80)}
    pictures = [[picture(*sizes[10], 10)], [picture(*sizes[20], 20), picture(*sizes[30], 30)]]
    crops = train.Crops(pictures, torch.device("cpu"))
    seen = ((crops.draw(400) + 1) * 127.5).round()
    assert seen.shape == (400, 3, 64, 64)
    counts = {}
    for rows, columns, blue in seen:
        height, width = sizes[int(blue[0, 0])]
        counts[int(blue[0, 0])] = counts.get(int(blue[0, 0]), 0) + 1
        assert (blue == blue[0, 0]).all()
        step = columns[0, 1] - columns[0, 0]
        assert step in (-1, 1)
        assert (rows == rows[0, 0] + torch.arange(64.0)[:, None]).all()
        assert (columns == columns[0, 0] + step * torch.arange(64.0)).all()
        assert rows.max() < height
        assert columns.max() < width
    # Each picture is as likely, its versions by their shares, 0.5 and 0.25.
    assert 150 < counts[10] < 250
    assert 1.2 < counts[20] / counts[30] < 3.2
    assert (seen[:, 1, 0, 1] < seen[:, 1, 0, 0]).float().mean().sub(0.5).abs() < 0.1


def test_levels_lie_where_they_are_asked_for():
    torch.manual_seed(0)
    levels = train.student_levels(4000, 0.01, 20.0, torch.device("cpu"))
    assert 0.01 <= levels.min() < 0.011
    assert 15 < levels.max() <= 20
    assert abs(float((levels < 0.316).float().mean()) - 0.5) < 0.05
    levels = train.teacher_levels(4000, torch.device("cpu"))
    assert levels.min() >= 0.002
    assert levels.max() <= 80
    assert abs(float(levels.log().median()) + 1.5) < 0.15
