import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
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


@contextlib.contextmanager
def default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


ARITHMETIC = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default float64": default_float64,
    "deterministic": deterministic,
}


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request):
    """What a caller may have in force that must not change what we compute: makes the context."""
    return ARITHMETIC[request.param]


@pytest.fixture
def at_once():
    """Call functions in eight threads that begin together; return what they return, in order."""

    def run(functions):
        together = threading.Barrier(8)

        def call(function):
            together.wait(60)
            return function()

        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(call, functions))

    return run
