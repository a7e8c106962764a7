"""Our networks and losses against the published ones, for the same random weights.

The numbers come from the folder that NCVSD_PARITY names; without it these tests are skipped.
"""

import pytest
import torch
from safetensors.torch import load_file

from ncvsd_inverse.networks import (
    ControlledDenoiser,
    ControlledDiscriminator,
    Denoiser,
    UNetShape,
    constrain_weights_,
)
from ncvsd_inverse.training.losses import (
    Observation,
    adversarial_loss,
    discriminator_losses,
    distillation_loss,
    generate,
    score_loss,
)

RTOL = 1e-5  # the published code and ours order float32 sums differently


def close(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm()) < RTOL


class Published:
    def __init__(self, folder, variant):
        self.weights = load_file(folder / f"weights_{variant}.safetensors")
        self.values = load_file(folder / f"values_{variant}.safetensors")
        self.shape = UNetShape(
            resolution=32,
            channels=(16, 32),
            blocks=1,
            attention=(16,),
            head_channels=16,
            num_classes=10 if variant == "labelled" else 0,
        )

    def load(self, cls, prefix):
        network = cls(self.shape)
        prefix += "."
        state = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        network.load_state_dict(state)
        constrain_weights_(network)
        return network.eval()

    @property
    def views(self):
        return [self.values[k] for k in ("x", "sigma", "condition", "condition_sigma")]


@pytest.fixture(scope="module", params=["unlabelled", "labelled"])
def published(request, parity_folder):
    return Published(parity_folder, request.param)


@pytest.fixture(scope="module")
def losses(parity_folder):
    return Published(parity_folder, "unlabelled")


@torch.no_grad()
def test_teacher(published):
    values = published.values
    teacher = published.load(Denoiser, "teacher")
    output = teacher(values["x"], values["sigma"], values.get("labels"))
    assert close(output, values["teacher_output"])
    assert close(teacher.log_variance(values["sigma"]).flatten(), values["teacher_logvar"])


@torch.no_grad()
def test_conditional_network(published):
    values = published.values
    network = published.load(ControlledDenoiser, "conditional")
    output = network(*published.views, values.get("labels"))
    assert close(output, values["conditional_output"])
    assert close(network.log_variance(values["sigma"]).flatten(), values["conditional_logvar"])


@torch.no_grad()
def test_discriminator(losses):
    logits = losses.load(ControlledDiscriminator, "discriminator")(*losses.views)
    assert close(logits, losses.values["discriminator_logits"])


@torch.no_grad()
def test_training_losses(losses):
    values = losses.values
    generator = losses.load(ControlledDenoiser, "conditional")
    score = losses.load(ControlledDenoiser, "score")
    discriminator = losses.load(ControlledDiscriminator, "discriminator")
    teacher = losses.load(Denoiser, "teacher")
    y, t = Observation(values["loss_y"], values["loss_sigma"]), values["loss_t"]

    fake, _ = generate(generator, y, values["score_z"], gamma=0.414)
    loss = score_loss(score, score.log_variance(t), fake, y, t, values["score_eps"])
    assert close(loss, values["score_loss"])

    fake, _ = generate(generator, y, values["discriminator_z"], gamma=0.414)
    eps = (values["discriminator_real_eps"], values["discriminator_fake_eps"])
    real_loss, fake_loss = discriminator_losses(
        discriminator, values["loss_images"], fake, y, t, eps
    )
    assert close(real_loss, values["discriminator_real_loss"])
    assert close(fake_loss, values["discriminator_fake_loss"])

    fake, sigma_hat = generate(generator, y, values["generator_z"], gamma=0.414)
    eps_x = values["generator_eps"]
    log_variance = generator.log_variance(sigma_hat)
    loss = distillation_loss(teacher, score, fake, log_variance, y, t, eps_x)
    assert close(loss, values["vsd_loss"])
    assert close(adversarial_loss(discriminator, fake, y, t, eps_x), values["adversarial_loss"])
