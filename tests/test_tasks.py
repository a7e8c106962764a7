import copy
import dataclasses
import pickle

import pytest
import torch

from ncvsd_inverse import operators as ops
from ncvsd_inverse.tasks import TYPICAL_MOTION, list_tasks, make_task


def test_the_benchmark_runs_six_tasks():
    assert list_tasks() == [
        "inpaint_box",
        "inpaint_random",
        "sr4x",
        "deblur_gaussian",
        "deblur_motion",
        "phase_retrieval",
    ]
    assert list_tasks(all=True)[: len(list_tasks())] == list_tasks()


@pytest.mark.parametrize("name", list_tasks(all=True))
@pytest.mark.parametrize("size", [64, (64, 96), (40, 32)])
def test_every_task_measures_images_of_its_size(name, size, generator):
    task = make_task(name, size)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    y = task.operator.measure(x, task.sigma_y, generator=generator)
    assert (task.name, task.sigma_y) == (name, 1.0 if name == "poisson" else 0.05)
    assert tuple(task.operator.input_shape(tuple(y.shape))) == tuple(x.shape)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.sigma_y = 0.1


@pytest.mark.parametrize("name", list_tasks(all=True))
def test_tasks_survive_pickles_and_copies(name, generator):
    task, x = make_task(name, 16), torch.rand(1, 3, 16, 16, generator=generator)
    y = task.operator(x)
    for twin in (pickle.loads(pickle.dumps(task)), copy.deepcopy(task)):
        assert (twin.name, twin.sigma_y, twin.title) == (name, task.sigma_y, task.title)
        assert torch.equal(twin.operator(x), y)


def test_boxes_hide_half_of_each_side():
    hidden = make_task("inpaint_box", (64, 96)).operator(torch.ones(1, 1, 64, 96)) == 0
    assert hidden[0, 0, 16:48, 24:72].all()
    assert int(hidden.sum()) == 32 * 48


def test_random_masks_keep_three_tenths_and_follow_the_seed():
    ones = torch.ones(1, 3, 128, 128)
    kept = make_task("inpaint_random", 128, seed=3).operator(ones)
    # Four standard errors of a share of 0.3 among 16384 pixels.
    assert float(kept.mean()) == pytest.approx(0.3, abs=0.0144)
    assert torch.equal(kept, make_task("inpaint_random", 128, seed=3).operator(ones))
    assert not torch.equal(kept, make_task("inpaint_random", 128, seed=4).operator(ones))


@pytest.mark.parametrize(
    ("size", "kernel_size", "std"),
    [(256, 61, 3.0), (64, 15, 1.5), ((256, 320), 61, 3.0), (100, 25, 1.78125)],
)
def test_blurs_have_the_stated_kernels(size, kernel_size, std):
    height, width = (size, size) if isinstance(size, int) else size
    delta = torch.zeros(1, 1, height, width)
    delta[..., height // 2, width // 2] = 1
    expected = ops.GaussianBlur(std, kernel_size)(delta)
    assert torch.allclose(make_task("deblur_gaussian", size).operator(delta), expected)
    motion = ops.MotionBlur(kernel_size, 0.5, seed=2 + TYPICAL_MOTION)(delta)
    assert torch.allclose(make_task("deblur_motion", size, seed=2).operator(delta), motion)


def test_reduction_and_phase_retrieval():
    x = torch.zeros(1, 3, 64, 48)
    assert make_task("sr4x", (64, 48)).operator(x).shape == (1, 3, 16, 12)
    assert make_task("phase_retrieval", 64).operator(x[..., :48, :]).shape == (1, 3, 112, 112)


def test_the_other_tasks_are_the_stated_operators():
    size, x = (64, 48), torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = ops.GaussianBlur(1.375, 11)(x)
    expected = {
        "colorize": ops.Colorize("luma")(x),
        "hdr": (2 * x).clamp(-1, 1),
        "compressed_sensing": ops.CompressedSensing(size, 0.5, seed=3)(x),
        "mri": ops.MaskedFourier.lines(size, 4, 0.08, seed=3)(x),
        "deblur_sr2x": ops.SuperResolution(2)(blurred),
        "poisson": ops.Poisson(20.0)(x),
    }
    assert list(expected) == list_tasks(all=True)[len(list_tasks()) :]
    for name, y in expected.items():
        assert torch.equal(make_task(name, size, seed=3).operator(x), y), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sr4", 64), "task must be one of inpaint_box, .*did you mean sr4x"),
        (("sr4x", 4), "size must be at least 8"),
        (("sr4x", (64, 0)), "size must be at least 8"),
    ],
)
def test_bad_tasks_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(*arguments)


def test_seed_is_not_negative():
    with pytest.raises(ValueError, match="seed"):
        make_task("inpaint_random", 64, seed=-1)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_motion_kernel_is_a_typical_one(size):
    def covered(kernel):
        return float(1 / kernel.square().sum())

    kernel = make_task("deblur_motion", size).operator.kernel
    law = [covered(ops.MotionBlur(kernel.shape[-1], 0.5, seed).kernel) for seed in range(100)]
    assert covered(kernel) == pytest.approx(sum(law) / len(law), rel=0.2)
