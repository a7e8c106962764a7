import os
from pathlib import Path

import pytest
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def folder_from(variable):
    """Return the folder that an environment variable names, or skip the test that asks for it."""
    if variable not in os.environ:
        raise pytest.skip.Exception(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture
def data_folder():
    """Folder of the data sets, whose layout README.md describes."""
    return folder_from("NCVSD_DATA")


@pytest.fixture
def weights_folder():
    """Folder with weights that do not ship with the package, those of LPIPS among them."""
    return folder_from("NCVSD_WEIGHTS")


@pytest.fixture(scope="session")
def parity_folder():
    """Folder with weights and outputs of the published networks."""
    return folder_from("NCVSD_PARITY")
