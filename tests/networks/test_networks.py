"""Networks: preconditioning, magnitude-preserving layers, starting from a teacher."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ConcatDiscriminator,
    ControlledDenoiser,
    ControlledDiscriminator,
    Denoiser,
    UNetShape,
    build_network,
    constrain_weights_,
    inference_dtype,
    network_config,
    normalize_weights_,
    project_gradients_,
)
from ncvsd_inverse.networks.edm2_layers import MPConv, mp_cat, mp_silu, mp_sum, pixel_norm
from ncvsd_inverse.training import ImageData, TeacherConfig, TeacherTrainer
from ncvsd_inverse.training.losses import (
    Observation,
    adversarial_loss,
    discriminator_losses,
    distillation_loss,
    generate,
    score_loss,
)

SHAPE = UNetShape(
    resolution=16, channels=(16, 32), blocks=1, attention=(4,), head_channels=16, patch=2
)
CONDITIONAL = [ConcatDenoiser, ControlledDenoiser]


def make(cls, shape=SHAPE, seed=0, **kwargs):
    torch.manual_seed(seed)
    network = cls(shape, **kwargs)
    normalize_weights_(network)
    if hasattr(network, "logvar_linear"):
        last = network.unet if hasattr(network, "unet") else network.dec
        torch.nn.init.constant_(last.out_gain, 0.7)
    return network


def observations(size=(16, 16), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *size, generator=generator)
    y = torch.randn(batch, 3, *size, generator=generator)
    return x, torch.tensor([0.7, 3.0])[:batch], y, torch.tensor([0.5, 2.0])[:batch]


@torch.no_grad()
def test_preconditioning_limits():
    network = make(Denoiser)
    x = torch.randn(1, 3, 16, 16)
    # As sigma -> 0 the image is returned; as sigma -> infinity the output is the bare network's,
    # of the images' own scale, whatever x is.
    assert torch.allclose(network(x, torch.tensor([1e-5])), x, atol=1e-4)
    assert float(network(x * 1e4, torch.tensor([1e4])).abs().max()) < 10


@torch.no_grad()
@pytest.mark.parametrize("cls", CONDITIONAL)
def test_a_student_starts_as_its_teacher(cls):
    teacher = make(Denoiser)
    student = cls.from_teacher(teacher)
    x, sigma, y, sigma_y = observations()
    assert torch.allclose(student(x, sigma, y, sigma_y), teacher(x, sigma), atol=1e-4)
    # Normalising a weight that was widened by zeros leaves the function alone.
    normalize_weights_(student)
    assert torch.allclose(student(x, sigma, y, sigma_y), teacher(x, sigma), atol=2e-3)


@pytest.mark.parametrize("cls", CONDITIONAL)
def test_the_condition_can_be_learned(cls):
    student = cls.from_teacher(make(Denoiser))
    x, sigma, y, sigma_y = observations()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    # Down and then up the same loss: one of the two pushes a blend that starts at 0 below 0.
    for sign in (1, -1, -1):
        optimizer.zero_grad()
        (sign * student(x, sigma, y, sigma_y).square().mean()).backward()
        optimizer.step()
        constrain_weights_(student)
    with torch.no_grad():
        difference = student(x, sigma, y, sigma_y) - student(x, sigma, -y, sigma_y)
    assert float(difference.abs().max()) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("cls", [ConcatDiscriminator, ControlledDiscriminator])
def test_discriminators_start_from_the_teachers_encoder(cls):
    teacher = make(Denoiser)
    discriminator = cls.from_teacher(teacher)
    logits = discriminator(*observations())
    assert logits.shape == (2,)
    assert torch.isfinite(logits).all()
    block = dict(teacher.unet.enc.named_parameters())["4x4_block0.conv_res0.weight"]
    branch = discriminator.unet.enc if cls is ConcatDiscriminator else discriminator.ctrl.enc
    assert torch.equal(dict(branch.named_parameters())["4x4_block0.conv_res0.weight"], block)


def test_projected_gradient_is_that_of_normalising_in_the_forward_pass():
    torch.manual_seed(0)
    layer = MPConv(6, 4, 3)
    normalize_weights_(layer)
    x = torch.randn(2, 6, 5, 5)

    layer(x).pow(3).sum().backward()
    project_gradients_(layer)

    weight = layer.weight.detach().clone().requires_grad_()
    norm = weight.flatten(1).square().mean(1).sqrt().reshape(-1, 1, 1, 1)
    rms = float(norm.detach().mean())
    out = torch.nn.functional.conv2d(x, weight / norm * rms * layer.scale, padding=1)
    out.pow(3).sum().backward()
    # The filters' rms differ by rounding only, so one mean rms stands for all.
    assert torch.allclose(layer.weight.grad, weight.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_layers_keep_unit_variance():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 64, 64, 64, generator=generator) for _ in range(2))
    conv = MPConv(64, 32, 3)
    normalize_weights_(conv)
    inner = conv(a)[..., 1:-1, 1:-1]
    for out in (mp_silu(a) / mp_silu(a).square().mean().sqrt(), mp_sum(a, b, 0.3), inner):
        assert abs(float(out.square().mean()) - 1) < 0.05
    # silu of a normal is not centred: its rms, not its std, is one.
    assert abs(float(mp_silu(a).square().mean()) - 1) < 0.01
    assert torch.allclose(mp_sum(a, b, torch.tensor(0.3)), mp_sum(a, b, 0.3), atol=1e-5)
    joined = mp_cat(a, b[:, :16])
    first, second = joined[:, :64], joined[:, 64:]
    assert abs(float(first.square().sum() / second.square().sum()) - 1) < 0.05
    assert torch.allclose(pixel_norm(3 * a).square().mean(1), torch.ones(1, 64, 64), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("cls", [Denoiser, *CONDITIONAL])
def test_inference_form_computes_the_same(cls):
    network = make(cls)
    arguments = observations() if cls is not Denoiser else observations()[:2]
    reference = network(*arguments)
    assert torch.allclose(network.to_inference(torch.float32)(*arguments), reference, atol=1e-5)
    half = make(cls).to_inference(torch.bfloat16)(*arguments)
    assert half.dtype == torch.float32
    # bfloat16 keeps 8 bits: relative errors of 2^-9 a layer over some twenty layers.
    assert float((half - reference).norm() / reference.norm()) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (20, 12)])
def test_any_size_networks_take_any_multiple(size):
    shape = UNetShape(resolution=16, channels=(16, 32), blocks=1, attention=(), patch=2)
    network = make(ConcatDenoiser, shape, any_size=True)
    assert network.resolution is None
    assert network.size_multiple == 4
    x, sigma, y, sigma_y = observations(size)
    out = network(x, sigma, y, sigma_y)
    assert out.shape == x.shape
    # No image of a batch sees another.
    alone = network(x[:1], sigma[:1], y[:1], sigma_y[:1])
    assert torch.allclose(out[:1], alone, atol=1e-5)


@torch.no_grad()
def test_labels_matter_and_none_is_unconditional():
    shape = UNetShape(resolution=8, channels=(16,), blocks=1, attention=(), num_classes=4)
    network = make(Denoiser, shape)
    for name, gain in network.named_parameters():
        if name.endswith("emb_gain"):
            gain.fill_(1.0)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 1.0])
    labels = torch.eye(4)[[1, 2]]
    assert not torch.allclose(network(x, sigma, labels), network(x, sigma))
    assert torch.equal(network(x, sigma), network(x, sigma, torch.zeros(2, 4)))


@pytest.mark.parametrize("cls", [Denoiser, ConcatDenoiser, ControlledDenoiser, ConcatDiscriminator])
def test_configuration_rebuilds_the_network(cls):
    network = make(cls, any_size=True)
    twin = build_network(network_config(network))
    assert type(twin) is cls
    assert twin.any_size
    twin.load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "os.system"}, "kind must be one of"),
        ({"channels": []}, "channels"),
        ({"resolution": 18}, "resolution must be a multiple of 4"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    config = network_config(make(Denoiser)) | change
    with pytest.raises(ValueError, match=message):
        build_network(config)


def test_missing_field_is_named():
    config = network_config(make(Denoiser))
    del config["sigma_data"]
    with pytest.raises(ValueError, match="sigma_data"):
        build_network(config)


def test_inference_dtype_is_one_that_this_cpu_runs():
    dtype = inference_dtype("cpu")
    assert dtype in (torch.float32, torch.bfloat16)
    assert math.isfinite(
        float(torch.ones(2, 2, dtype=dtype).mm(torch.ones(2, 2, dtype=dtype))[0, 0])
    )


def test_shapes_of_one_network_are_equal():
    wide = {"resolution": 256, "channels": (128, 256, 384, 512)}
    named = UNetShape(**wide, attention=(16, 8))
    read = UNetShape(**wide, attention=(), bottleneck_attention=True)
    assert named == read
    assert (named.attention, named.bottleneck_attention) == ((), True)
    assert UNetShape(**wide, attention=()) != read
    assert UNetShape(**wide, attention=(32, 64)).attention == (64, 32)
    with pytest.raises(TypeError, match="bottleneck_attention must be true or false, got 'no'"):
        UNetShape(**wide, bottleneck_attention="no")


@pytest.mark.parametrize("attention", [(), (8,), (4,), (2,)])
@pytest.mark.parametrize("bottleneck", [None, True, False])
def test_where_blocks_attend(attention, bottleneck):
    shape = UNetShape(
        8, channels=(16, 16), blocks=1, attention=attention, bottleneck_attention=bottleneck
    )
    with torch.device("meta"):
        names = Denoiser(dataclasses.replace(shape, head_channels=16)).state_dict()
    attending = {name.split(".")[2] for name in names if "attn_qkv" in name}
    met = set(attention) & {8, 4}
    expected = {f"{side}x{side}_block{index}" for side in met for index in (0, 1)}
    if bottleneck or (bottleneck is None and attention):
        expected.add("4x4_in0")
    assert attending == expected


def test_cards_of_before_keep_their_networks():
    for attention, expected in (((4,), True), ((), False)):
        shape = dataclasses.replace(SHAPE, attention=attention, bottleneck_attention=None)
        config = network_config(make(Denoiser, shape))
        assert config.pop("bottleneck_attention") is expected
        assert build_network(config).shape == shape


def test_runs_of_before_are_taken_up(tmp_path):
    settings = {"images": 16, "batch_size": 8, "warmup_images": 0}
    data = ImageData(torch.zeros(16, 3, 16, 16, dtype=torch.uint8))

    def run(**changes):
        network = dataclasses.replace(SHAPE, **changes)
        return TeacherTrainer(TeacherConfig(network=network, **settings), data, tmp_path)

    run().run(seconds=0.0)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["network"]["bottleneck_attention"]
    saved["network"]["attention"] = [64, 4]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"other settings.*network"):
        run(bottleneck_attention=False).run(seconds=0.0)
    run().run(seconds=0.0)
    assert json.loads(path.read_text())["network"]["attention"] == [4]


def test_a_network_without_values_is_made_without_the_compiler():
    code = """
import sys, torch
from ncvsd_inverse.networks import *
with torch.device("meta"):
    torch.nn.Linear(1, 1)
there = "sympy" in sys.modules  # torch 2.6 needs it for any layer
with torch.device("meta"):
    ControlledDenoiser(UNetShape(16, channels=(16, 16), num_classes=3)).state_dict()
assert there or "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("cls", [Denoiser, *CONDITIONAL])
def test_new_networks_do_not_depend_on_the_callers_arithmetic(cls, arithmetic):
    shape = dataclasses.replace(SHAPE, num_classes=3)
    torch.manual_seed(0)
    expected = cls(shape).state_dict()
    torch.manual_seed(0)
    with arithmetic():
        found = cls(shape).state_dict()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


# Against the published networks and losses, for the same weights, which NCVSD_PARITY holds.

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
