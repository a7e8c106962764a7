"""Dropout in a teacher's training: what is dropped, and that a run can still be taken up again."""

import json

import pytest
import torch
from accelerate import Accelerator

from ncvsd_inverse.networks import ConcatDenoiser, ControlledDenoiser, Denoiser, UNetShape
from ncvsd_inverse.networks.unet import Block
from ncvsd_inverse.training import ImageData, TeacherConfig, TeacherTrainer, load_teacher

TINY = UNetShape(resolution=8, channels=(16, 16), blocks=1, attention=(), patch=2)


def images(num=20):
    generator = torch.Generator().manual_seed(0)
    return ImageData(torch.randint(0, 256, (num, 3, 8, 8), generator=generator, dtype=torch.uint8))


def config(**changes):
    settings = {"network": TINY, "images": 48, "batch_size": 8, "warmup_images": 16}
    return TeacherConfig(**settings | {"precision": "float32", "dropout": 0.2} | changes)


def weights(run):
    return torch.cat([value.flatten() for value in run.network.state_dict().values()])


def test_values_are_dropped_between_the_convolutions_of_every_block():
    torch.manual_seed(0)
    network = Denoiser(TINY, dropout=0.25)
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    seen = []
    for block in blocks:
        block.conv_res1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x, sigma = torch.randn(64, 3, 8, 8), torch.full((64,), 0.5)
    network.eval()
    plain = network(x, sigma)
    assert torch.equal(network(x, sigma), plain)
    whole = seen[0]  # the first block's input does not depend on what others drop
    seen.clear()
    network.train()
    network(x, sigma)
    assert len(seen) == len(blocks)
    for values in seen:
        share, error = float((values == 0).float().mean()), (0.25 * 0.75 / values.numel()) ** 0.5
        assert abs(share - 0.25) < 4 * error
    kept = seen[0] != 0
    assert torch.allclose(seen[0][kept], whole[kept] / 0.75, rtol=1e-5)


def test_students_have_no_dropout():
    teacher = Denoiser(TINY, dropout=0.25)
    for kind in (ConcatDenoiser, ControlledDenoiser):
        student = kind.from_teacher(teacher)
        assert {m.dropout for m in student.modules() if isinstance(m, Block)} == {0.0}


def test_a_resumed_run_drops_what_the_uninterrupted_one_does(tmp_path):
    torch.set_num_threads(1)
    whole = TeacherTrainer(config(), images(), tmp_path / "whole")
    whole.run()
    assert TeacherTrainer(config(images=24), images(), tmp_path / "parts").run()
    torch.rand(5)  # what others draw from the shared random state is of no account
    resumed = TeacherTrainer(config(), images(), tmp_path / "parts")
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))

    for change in ({"dropout": 0.0}, {"microbatch": 4}):
        other = TeacherTrainer(config(**change), images(), tmp_path / str(change))
        other.run()
        assert not torch.equal(weights(other), weights(whole))


def test_what_is_dropped_follows_from_seed_step_and_process(tmp_path, monkeypatch):
    run = TeacherTrainer(config(), images(), tmp_path)

    def draw():
        with run._seeded_dropout():
            return tuple(torch.rand(3).tolist())

    state = torch.get_rng_state()
    draws = [draw()]
    assert draw() == draws[0]
    assert torch.equal(torch.get_rng_state(), state)
    run.step = 1
    draws.append(draw())
    monkeypatch.setattr(Accelerator, "process_index", property(lambda _: 1))
    draws.append(draw())
    run.config = config(seed=1)
    draws.append(draw())
    assert len(set(draws)) == 4


def test_a_trained_teacher_drops_nothing(tmp_path):
    run = TeacherTrainer(config(), images(), tmp_path)
    run.run()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        for teacher in (load_teacher(tmp_path), run.averaged("teacher")):
            assert torch.equal(teacher(x, sigma), teacher(x, sigma))


def test_a_run_of_before_there_was_dropout_goes_on_without(tmp_path):
    TeacherTrainer(config(dropout=0.0), images(), tmp_path).run(seconds=0.0)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["dropout"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"other settings: \['dropout'\]"):
        TeacherTrainer(config(), images(), tmp_path).run(seconds=0.0)
    TeacherTrainer(config(dropout=0.0), images(), tmp_path).run(seconds=0.0)


@pytest.mark.parametrize(
    ("value", "error"), [(1.0, ValueError), (-0.1, ValueError), ("much", TypeError)]
)
def test_wrong_shares_are_refused(value, error):
    with pytest.raises(error, match="dropout must"):
        config(dropout=value)
