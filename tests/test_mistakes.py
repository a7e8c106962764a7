"""Typical mistakes: each ends in one short line that names the argument, soon."""

import re
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import ncvsd_inverse as nv
from ncvsd_inverse import CheckpointError, cli, metrics, solve
from ncvsd_inverse import operators as ops
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior, load_prior

MOST_SECONDS = 0.5
"""What a mistake may take of a processor, the import of torch and of this package not counted."""

LONGEST = 350

Y = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
META = Y.to("meta")
MASK = torch.ones(8, 8)


class Network(nn.Module):
    """Something with weights on a device."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x, sigma):
        return self.layer(x)


class Slow:
    """A prior that must never be asked: that would take long."""

    nfe_per_sample, image_shape = 2, (3, 8, 8)

    def sample(self, u, sigma, *, generator=None):
        raise AssertionError("computed before the arguments were checked")

    def denoise(self, u, sigma):
        return self.sample(u, sigma)


PRIOR = GaussianPrior(torch.zeros(3, 8, 8), torch.eye(192))
TEACHER = DiffusionPrior(PRIOR.denoise, image_shape=(3, 8, 8))
ELSEWHERE = DiffusionPrior(Network().to("meta"), image_shape=(3, 8, 8))
UNASKED = DiffusionPrior(Slow().denoise, image_shape=(3, 8, 8))


def solving(y=Y, **changes):
    given = {"operator": ops.Denoise(), "prior": PRIOR, "nfe": 2, **changes}
    return lambda: solve(y, **given)


CALLS = {
    # solve: numbers
    "no call": (solving(nfe=0), "nfe must be at least 1, got 0"),
    "half a call": (solving(nfe=2.5), "nfe must be an integer, got 2.5"),
    "calls as text": (solving(nfe="10"), "nfe must be an integer, got '10'"),
    "an odd number of calls": (
        solving(nfe=5, prior=TEACHER.with_steps(2)),
        "nfe must be a multiple of the prior's nfe_per_sample = 2, got 5",
    ),
    "negative noise": (solving(sigma_y=-1), "sigma_y must be positive and finite, got -1"),
    "noise that is no number": (solving(sigma_y=float("nan")), "sigma_y must be positive .* nan"),
    "a misspelt auto": (
        solving(sigma_y="estimate"),
        "sigma_y must be a number, 'auto' or None, got 'estimate'",
    ),
    "a noise an image": (solving(sigma_y=[0.1, 1]), r"sigma_y must be a number, got \[0.1, 1\]"),
    "no sample": (solving(num_samples=0), "num_samples must be at least 1, got 0"),
    "no restart": (solving(restarts=0), "restarts must be at least 1, got 0"),
    "no batch": (solving(batch_size=0), "batch_size must be at least 1, got 0"),
    "a negative seed": (solving(seed=-1), "seed must be non-negative, got -1"),
    "a seed with a fraction": (solving(seed=1.5), "seed must be an integer, .* got 1.5"),
    "a seed too many": (solving(seed=[1, 2, 3]), "seed must be .* each of 2 images, got 3"),
    "too hot": (solving(temperature=2), r"temperature must be in \(0, 1\], got 2"),
    "no assumed noise": (solving(sigma_lik=0), "sigma_lik must be positive and finite, got 0"),
    "a rising schedule": (solving(schedule=[0.1, 1]), "schedule must be .* decreasing, got .0.1"),
    "a level as schedule": (solving(schedule=3.0), "schedule must be a sequence of numbers, got 3"),
    "a short schedule": (solving(schedule=[1.0]), "schedule must have .* = 2 levels, got 1"),
    # solve: before anything takes long
    "calls of a slow prior": (solving(nfe=0, prior=UNASKED), "nfe must be at least 1, got 0"),
    "levels of a slow prior": (
        solving(schedule=[1.0], prior=UNASKED),
        "schedule must have .* = 2 levels, got 1",
    ),
    # solve: names
    "a misspelt method": (solving(method="gibs"), "method must be .* did you mean gibbs"),
    "an unknown estimate": (solving(estimate="median"), "estimate must be one of .*, got 'median'"),
    "an unknown preset": (solving(preset="paper"), "preset must be one of ncvsd, got 'paper'"),
    "a misspelt prior": (
        solving(prior="ncvsd_face64"),
        "prior must be one of .* got 'ncvsd_face64'; did you mean ncvsd_faces64",
    ),
    "a prior that is nowhere": (solving(prior="/no/such.json"), "there is no /no/such.json"),
    # solve: kinds
    "no prior": (solving(prior=None), "prior must have a sample method, got NoneType"),
    "the class of a prior": (solving(prior=GaussianPrior), "prior must .* the class GaussianPrior"),
    "a network for a prior": (solving(prior=Network()), "prior must have a .* got Network: "),
    "no operator": (solving(operator=None), "operator must be callable .* got NoneType"),
    "the class of an operator": (solving(operator=ops.Denoise), "operator must .* class Denoise"),
    "a task for an operator": (
        solving(operator=nv.make_task("sr4x", 8)),
        "operator must be callable and have input_shape, got Task",
    ),
    "an unknown argument": (solving(nef=3), "unexpected keyword argument 'nef'"),
    "a callback that is none": (solving(callback=3), "callback must be callable, got int"),
    # solve: measurements
    "y of numpy": (solving(Y.numpy()), "y must be a torch tensor, got ndarray"),
    "y of 8 bits": (solving(Y.byte()), r"y must be a floating-point tensor .* got torch.uint8"),
    "y in half precision": (solving(Y.half()), "y must be float32 or float64, got torch.float16"),
    "y without batch": (solving(Y[0]), r"y must be a measurement .* got shape \(3, 8, 8\)"),
    "y of no image": (solving(Y[:0]), r"y must have shape \(B, ...\) with B >= 1, got \(0, 3"),
    "y of another size": (solving(torch.zeros(1, 3, 9, 9)), r"y must come from images of shape"),
    "y with a hole": (solving(Y / 0), "y must be finite, got .* values NaN or infinite"),
    "a mask of another size": (
        solving(operator=ops.Inpaint(torch.ones(4, 4))),
        r"y must be .* height and width of mask, \(4, 4\), got \(8, 8\)",
    ),
    # devices
    "y elsewhere": (solving(META), "y must hold values, got a tensor on the device meta"),
    "a prior elsewhere": (
        solving(prior=ELSEWHERE),
        "y must be on the prior's device meta, got cpu",
    ),
    "images elsewhere": (
        lambda: ELSEWHERE.denoise(Y, 0.5),
        "x must be on the prior's device, meta, got cpu",
    ),
    "a mask elsewhere": (
        lambda: ops.Inpaint(MASK.to("meta")),
        "mask must hold values, got a tensor on the device meta",
    ),
    "a kernel elsewhere": (lambda: ops.Blur(META[0, 0]), "kernel must hold values"),
    "a mean elsewhere": (
        lambda: GaussianPrior(META[0], torch.eye(192)),
        "mean must hold values",
    ),
    "levels elsewhere": (
        lambda: PRIOR.sample(Y, torch.ones(2, device="meta")),
        "sigma must hold values",
    ),
    "random numbers elsewhere": (
        lambda: ops.Denoise().measure(META, 0.1, generator=torch.Generator()),
        "generator must be on the device of the images, meta, got cpu",
    ),
    "a truth elsewhere": (lambda: metrics.psnr(Y, META), "reference must hold values"),
    "a device that is none": (
        lambda: load_prior("ncvsd_faces64", "gpu"),
        "device must be usable here, got 'gpu': ",
    ),
    # operators
    "a mask of numpy": (lambda: ops.Inpaint(np.ones((8, 8))), "mask must be .* got ndarray"),
    "a mask of 8 bits": (lambda: ops.Inpaint(MASK * 255), "mask must hold only 0 and 1, got"),
    "a mask that hides all": (lambda: ops.Inpaint(MASK * 0), "mask must measure at least one"),
    "a kernel of integers": (lambda: ops.Blur(MASK.int()), "kernel must be a floating-point"),
    "a kernel of zeros": (lambda: ops.Blur(0 * MASK), "kernel must have a weight other than 0"),
    "a kernel wider than the image": (
        lambda: ops.GaussianBlur(2, 9)(Y),
        r"kernel must be at most as large as the image, \(8, 8\), got \(9, 9\)",
    ),
    "an unknown boundary": (lambda: ops.GaussianBlur(1, 3, "mirror"), "boundary must be one of"),
    "no factor": (lambda: ops.SuperResolution(0), "factor must be at least 1, got 0"),
    "a factor with a fraction": (lambda: ops.SuperResolution(2.0), "factor must be an integer"),
    "a factor that leaves a rest": (
        lambda: ops.SuperResolution(3)(Y),
        r"x must have a height and width that divide by factor = 3, got \(8, 8\)",
    ),
    "a box larger than the image": (lambda: ops.Inpaint.box(8, 9), r"side must be at most \(8, 8"),
    "three sides": (lambda: ops.Inpaint.box((8, 8, 3), 2), r"size must be one integer or \(height"),
    "a share above 1": (lambda: ops.CompressedSensing(8, 2), r"ratio must be in \(0, 1\], got 2"),
    "a negative pad": (lambda: ops.PhaseRetrieval(-1), "pad must be at least 0, got -1"),
    "a seed for a generator": (
        lambda: ops.Denoise().measure(Y, 0.1, generator=0),
        "generator must be a torch.Generator, or one for each image, got 0",
    ),
    "images without batch": (lambda: ops.GaussianBlur(1, 3)(Y[0]), r"x must have shape \(B, C, H"),
    # tasks, schedules, priors, pictures
    "a misspelt task": (lambda: nv.make_task("sr8x", 64), "task must be .* did you mean sr4x"),
    "a tiny task": (lambda: nv.make_task("sr4x", 4), "size must be at least 8, got 4"),
    "no level": (lambda: nv.karras(0), "num must be at least 1, got 0"),
    "levels the wrong way": (lambda: nv.karras(3, 1, 2), "largest must be above smallest = 2"),
    "no image to generate": (lambda: TEACHER.generate(0), "num must be at least 1, got 0"),
    "images of two sides": (
        lambda: DiffusionPrior(PRIOR.denoise, image_shape=(8, 8)),
        r"image_shape must be \(C, H, W\), got \(8, 8\)",
    ),
    "a level of 0": (lambda: PRIOR.sample(Y, 0), "sigma must be positive and finite, got 0"),
    "a level too high": (lambda: TEACHER.denoise(Y, 100), "sigma must be .* at most 80.8, got 100"),
    "a class that is none": (lambda: TEACHER.conditioned_on(1), "label must be below .* got 1"),
    "statistics of one image": (
        lambda: nv.measure_statistics(PRIOR, Y[:1]),
        "images must hold at least 2, got 1",
    ),
    "statistics of equal images": (
        lambda: nv.measure_statistics(PRIOR, 0 * Y),
        "images must differ from their mean, got 2 that do not",
    ),
    "tiles of a fixed size": (lambda: nv.tiled(TEACHER), "prior must take images of any size"),
    "a picture that is missing": (lambda: nv.read_image("none.png"), "none.png must be a readable"),
    "several images as a picture": (
        lambda: nv.write_image("x.png", Y),
        r"x must have shape \(1, 1 or 3, H, W\), got \(2, 3, 8, 8\)",
    ),
    "a picture of no kind": (
        lambda: nv.write_image("x.xyz", Y[:1]),
        r"path must end in one of \.bmp, .* got x.xyz",
    ),
    "a truth of other channels": (
        lambda: metrics.psnr(Y, Y[:, :1]),
        r"reference must have shape \(2, 3, 8, 8\), got \(2, 1, 8, 8\)",
    ),
    "images too small for a metric": (lambda: metrics.ssim(Y, Y), "x must be at least 11 pixels"),
}  # fmt: skip


def quickly(call, errors):
    """Return the error of a call; it must take little time, at one of three tries if it is busy."""
    for _ in range(3):
        started = time.process_time()
        with pytest.raises(errors) as caught:
            call()
        if time.process_time() - started < MOST_SECONDS:
            return caught
    return pytest.fail(f"it took more than {MOST_SECONDS} s three times")


@pytest.mark.parametrize("mistake", CALLS)
def test_mistake_in_a_call(mistake):
    call, message = CALLS[mistake]
    caught = quickly(call, (ValueError, TypeError, CheckpointError))
    line = str(caught.value)
    assert re.search(message, line), line
    assert "\n" not in line
    assert len(line) <= LONGEST


SOLVE = "solve p.png --task denoise"
WORDS = {
    # words
    "solv p.png": "No such command 'solv'",
    "solve p.png": "Missing option '--task'",
    "solve --task denoise": "Missing argument 'IN...'",
    f"{SOLVE} --nef 3": "No such option: --nef",
    f"{SOLVE} --nfe ten": "Invalid value for '--nfe': .*'ten'",
    f"{SOLVE} --nfe=2.5": "Invalid value for '--nfe': .*'2.5'",
    f"{SOLVE} --method gibs": "Invalid value for '--method': .*'gibs' is not one of .*'gibbs'",
    f"{SOLVE} --estimate median": "Invalid value for '--estimate': .*'median' is not one of",
    f"{SOLVE} --nfe": "Option '--nfe' requires an argument",
    "evaluate ncvsd_faces64": "Missing option '--data'",
    "distill faces64 --data pics -o r": "Missing option '--teacher'",
    # numbers
    f"{SOLVE} --nfe 0": "--nfe must be at least 1, got 0",
    f"{SOLVE} --samples 0": "--samples must be at least 1, got 0",
    f"{SOLVE} --seed -1": "--seed must be at least 0, got -1",
    f"{SOLVE} --sigma-y -1": "--sigma-y must be positive and finite, got -1",
    f"{SOLVE} --sigma-y foo": "--sigma-y must be a number or auto, got 'foo'",
    f"{SOLVE} --temperature 2": r"--temperature must be in \(0, 1\], got 2",
    f"{SOLVE} --sigma-lik 0": "--sigma-lik must be positive and finite, got 0",
    f"{SOLVE} --schedule a,b": "--schedule must be numbers separated by commas, got 'a,b'",
    f"{SOLVE} --schedule 1,2": r"--schedule must be .* decreasing, got \(1.0, 2.0\)",
    f"{SOLVE} --steps 0": "--steps must be at least 1, got 0",
    f"{SOLVE} --tile 0": "--tile must be at least 1, got 0",
    "solve p.png --task sr": "--scale must be 2, 3, 4 or 8 for --task sr, got None",
    "solve p.png --task sr --scale 5": "--scale must be 2, 3, 4 or 8 for --task sr, got 5",
    "solve p.png --task deblur --blur-std -1": "--blur-std must be positive and finite, got -1",
    "solve p.png --task deblur --blur-std 1e6": "--blur-std must be at most 100 pixels, got 1e.06",
    "solve p.png --task poisson --peak 0": "--peak must be positive and finite, got 0",
    "demo --nfe 0": "--nfe must be at least 1, got 0",
    "demo --samples 0": "--samples must be at least 1, got 0",
    "evaluate ncvsd_faces64 --data pics --draws 1": "--draws must be at least 2, got 1",
    "evaluate ncvsd_faces64 --data pics --levels -1": "--levels must be positive .* got -1",
    "evaluate ncvsd_faces64 --data pics --images 0": "--images must be at least 2, got 0",
    "train faces64 --data pics -o r --images 0": "images must be at least 1, got 0",
    "train faces64 --data pics -o r --batch-size 0": "batch_size must be at least 1, got 0",
    "train faces64 --data pics -o r --seconds -1": "Invalid value for '--seconds': .* got '-1'",
    "encode pics out.zip --size 0": "size must be at least 1, got 0",
    # names
    "solve p.png --task denois": "--task must be one of .* got 'denois'; did you mean denoise",
    "solve p.png --task sr4x": "--task sr4x must come with --simulate",
    "solve p.png --task sr5x --simulate": "task must be one of .* got 'sr5x'; did you mean sr4x",
    f"{SOLVE} --prior ncvsd_natual": "prior must be .* got 'ncvsd_natual'; did you mean ncvsd_natu",
    f"{SOLVE} --device gpu": "--device must be usable here, got 'gpu'",
    f"{SOLVE} --device meta": "--device must hold values, got 'meta'",
    "priors nope": "prior must be one of .* got 'nope'",
    "train nope --data pics -o r": "config must be one of .* got 'nope'",
    "statistics nope": "prior must be one of .* got 'nope'",
    # options of other tasks
    f"{SOLVE} --scale 2": "--scale must come with --task sr, got denoise",
    "solve p.png --task deblur": "must have --kernel FILE, --blur-std S or --blind, got none",
    "solve p.png --task poisson": "--peak must be given for --task poisson",
    "solve p.png pics/a.png --task denoise -o x.png": "--out must be a folder for 2 pictures",
    # files
    "solve none.png --task denoise": "IN must be a file or folder that exists, got none.png",
    "solve empty --task denoise": "empty must hold files .* got none",
    "solve p.png p.png --task denoise": "IN must have names that differ",
    "evaluate ncvsd_faces64 --data none": "--data must be a folder or a zip archive, got none",
    "convert none.pkl out": "none.pkl cannot be read: there is no such file",
    "convert p.png out": "p.png cannot be read: ",
    "train none.toml --data pics -o r": "config must be a file that exists, got none.toml",
    "train faces64 --data none -o r": "data must be an existing zip or folder, got none",
    "train faces64 --data pics -o p.png": "Invalid value for '--out'.*'p.png' is a file",
    "encode none out.zip": "data must be an existing zip or folder, got none",
    "encode pics out.txt": "target must be a zip that does not exist yet, got out.txt",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to make mistakes in."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "empty").mkdir()
    (folder / "pics").mkdir()
    nv.write_image(folder / "p.png", torch.zeros(1, 3, 16, 16))
    nv.write_image(folder / "pics" / "a.png", torch.zeros(1, 3, 16, 16))
    return folder


@pytest.mark.parametrize("words", WORDS)
def test_mistake_on_the_command_line(words, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["ncvsd", *words.split()])
    before = sorted(place.rglob("*"))

    def run():
        capfd.readouterr()  # of the try before
        cli.main()

    ended = quickly(run, SystemExit)
    assert ended.value.code in (1, 2)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1), (out, err)
    assert err.startswith("error: ")
    assert re.search(WORDS[words], err), err
    assert len(err) <= LONGEST
    assert sorted(place.rglob("*")) == before


def test_without_words_there_is_help(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["ncvsd"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert "solve" in out + err
    assert "error" not in out + err


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory.\nTried to allocate 20 GiB."),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    ],
)
def test_too_little_memory_is_a_line(monkeypatch, capfd, kind, message):
    def full():
        raise kind(message)

    monkeypatch.setattr(cli.priors, "list_priors", full)
    monkeypatch.setattr(sys, "argv", ["ncvsd", "priors"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capfd.readouterr().err == f"error: {' '.join(message.split())}\n"
