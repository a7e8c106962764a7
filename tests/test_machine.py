import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ncvsd_inverse import load_prior, solve
from ncvsd_inverse.machine import check_device, extra, find_device
from ncvsd_inverse.operators import Denoise
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.training.sharding import make_mesh

ROOT = Path(__file__).parent.parent
REFUSED = "must be on the CPU or a CUDA GPU, got mps: Apple's GPUs have no float64"


class OnMPS(torch.Tensor):
    """A tensor that says that it is on one of Apple's GPUs."""

    device = torch.device("mps")


def test_mps_is_refused_wherever_it_is_asked_for():
    prior = GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))
    y = torch.zeros(1, 1, 2, 2).as_subclass(OnMPS)
    with pytest.raises(ValueError, match=f"^y {REFUSED}"):
        solve(y, operator=Denoise(), prior=prior)
    for device in ("mps", "mps:0"):
        with pytest.raises(ValueError, match=f"^device {REFUSED}"):
            load_prior("ncvsd_faces64", device=device)
        with pytest.raises(ValueError, match=f"^--device {REFUSED}"):
            find_device(device)
    assert check_device("y", torch.device("cpu")) == torch.device("cpu")


def test_sharding_needs_a_torch_that_can(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0"))
    with pytest.raises(ImportError, match=r"--fsdp needs torch 2.7 or later, got 2.6.0"):
        make_mesh(torch.device("cpu"), 2)
    assert torch.torch_version.TorchVersion("2.14.1") >= "2.7"


def test_what_an_extra_installs_is_named():
    with (
        pytest.raises(
            ImportError, match=r"^this needs the package nowhere: pip install 'ncvsd-inverse\[train"
        ),
        extra("train"),
    ):
        importlib.import_module("nowhere")
    with pytest.raises(ValueError, match="as it was"), extra("train"):
        raise ValueError("as it was")


WITHOUT_EXTRAS = """
import sys
for name in ("accelerate", "tensorboard", "datasets", "diffusers"):
    sys.modules[name] = None
import torch, ncvsd_inverse
from ncvsd_inverse import load_prior, solve
from ncvsd_inverse.cli import main
from ncvsd_inverse.operators import Inpaint
x = torch.zeros(1, 3, 64, 64)
operator = Inpaint.box((64, 64), 8)
result = solve(operator(x), operator=operator, prior=load_prior("ncvsd_faces64"), nfe=1)
assert result.x0.shape == x.shape
pictures = sys.argv[1]
for command in ("train", "distill --teacher ncvsd_faces64_teacher"):
    words = command.split()
    sys.argv = ["ncvsd", words[0], "faces64", *words[1:], "--data", pictures, "-o", "run"]
    try:
        main()
    except SystemExit as ended:
        print(ended.code)
"""


def test_restoring_needs_no_extra_and_training_names_its_own(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shipped = ROOT / "ncvsd_inverse" / "assets" / "grace_hopper.png"
    (pictures / "a.png").write_bytes(shipped.read_bytes())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_EXTRAS, pictures],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = "error: this needs the package accelerate: pip install 'ncvsd-inverse[train]'\n"
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n1\n"
    assert done.stderr == said * 2
    assert not (tmp_path / "run").exists()
