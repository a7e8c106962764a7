"""A tiny prior to save and load, and folders of its own to look for it in."""

import torch

from ncvsd_inverse.networks import ConcatDenoiser, UNetShape

CARD = {
    "name": "tiny",
    "kind": "ncvsd",
    "image_shape": [3, 8, 8],
    "gamma": 0.3,
    "sigma_min": 0.004,
    "sigma_max": 40.0,
    "licence": "research use only",
    "data": "noise",
    "training": {"command": "none", "steps": 0},
    "evaluation": {},
    "weaknesses": "knows nothing",
    "intended_use": "tests",
}

SHAPE = UNetShape(8, channels=(8, 16), blocks=1, attention=(), head_channels=8)


def make_network(cls=ConcatDenoiser, **changes):
    """A network whose gains and blends are not what they begin with."""
    torch.manual_seed(0)
    network = cls(SHAPE, **changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5 if "gain" in name else 0.3)
    return network


def use_folders(monkeypatch, tmp_path, own):
    """Look for names in an empty package, an empty cache and the folder `own`."""
    monkeypatch.setattr("ncvsd_inverse.priors.files.PACKAGE_WEIGHTS", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NCVSD_WEIGHTS", str(own))
