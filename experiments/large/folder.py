r"""What `ncvsd solve` of a folder costs beyond the passes through the network.

    python experiments/large/folder.py --data DIR/faces64/test.zip --out experiments/large

Makes folders of measured pictures, task by task, and restores each by the command's own function
in this process, with both loops. Times are CPU seconds a picture of one thread
(`time.process_time`), which do not count other programs on the machine: of the command, of its
calls of `solve`, and of the passes through the network within those. The first tells what a folder
costs, the second what of it is the loop, the third is the bare network. What is paid once, from
the start of the interpreter to the end of a folder of one picture, is measured before. `--profile`
prints where the time goes instead.
"""

import argparse
import cProfile
import io
import json
import pstats
import tempfile
import time
from contextlib import redirect_stdout
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ncvsd_inverse
from ncvsd_inverse import Result, __version__, cli, load_prior
from ncvsd_inverse import solve as restore
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import read_images, write_image
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Blur, Inpaint, SuperResolution
from ncvsd_inverse.priors import NCVSDPrior
from ncvsd_inverse.tasks import make_task

SIDE, NFE = 64, 10


def main() -> None:
    """Measure, print and write `folder.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or zip of 64x64 images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--tasks", nargs="+", default=["deblur_gaussian", "sr4x", "inpaint_random"])
    parser.add_argument("--prior", default="ncvsd_faces64")
    parser.add_argument("--methods", nargs="+", default=["gibbs", "conditioning"])
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    truths = torch.cat(list(islice(read_images(asked.data), asked.images)))
    prior = load_prior(asked.prior)
    assert isinstance(prior, NCVSDPrior)
    watch = Watch(prior)
    with tempfile.TemporaryDirectory() as place:
        command_seconds(measure(truths[:1], "sr4x", Path(place), asked.prior, asked.methods[0]))
    once = time.process_time()
    rows = []
    for method, name in product(asked.methods, asked.tasks):
        with tempfile.TemporaryDirectory() as place:
            arguments = measure(truths, name, Path(place), asked.prior, method)
            if asked.profile:
                profile(arguments)
                continue
            watch.solve = watch.network = 0.0
            seconds = command_seconds(arguments)
        times = {"command": seconds, "solve": watch.solve, "network": watch.network}
        row = {f"{part}_seconds": value / len(truths) for part, value in times.items()}
        row["above_network"] = seconds / watch.network - 1
        row["above_solve"] = seconds / watch.solve - 1
        print(method, name, row)
        rows.append({"method": method, "task": name, **row})
    if rows:
        record = {"images": len(truths), "nfe": NFE, "prior": asked.prior, "seconds_once": once}
        record |= {"version": __version__, "rows": rows}
        content = json.dumps(record, indent=1) + "\n"
        write_whole(asked.out / "folder.json", content)


class Watch:
    """Gives the command its prior and adds up the CPU seconds of `solve` and of the network."""

    def __init__(self, prior: NCVSDPrior) -> None:
        self.solve = self.network = self.began = 0.0

        def solve(y: Tensor, **options: object) -> Result:
            began = time.process_time()
            result = restore(y, **options)  # type: ignore[arg-type]
            self.solve += time.process_time() - began
            return result

        def begin(*_: object) -> None:
            self.began = time.process_time()

        def end(*_: object) -> None:
            self.network += time.process_time() - self.began

        prior.network.register_forward_pre_hook(begin)
        prior.network.register_forward_hook(end)
        setattr(ncvsd_inverse, "solve", solve)  # noqa: B010 - what the command calls is watched
        setattr(cli.inputs, "load_prior", lambda *_, **__: prior)  # noqa: B010


def measure(truths: Tensor, name: str, place: Path, prior: str, method: str) -> list[str]:
    """Write the measurements of a task as pictures; return the command that restores them."""
    task = make_task(name, SIDE)
    noise = make_generators([(i,) for i in range(len(truths))])
    (place / "in").mkdir()
    for i, y in enumerate(task.operator.measure(truths, task.sigma_y, generator=noise)):
        write_image(place / "in" / f"{i:04d}.png", y[None])
    arguments = ["solve", str(place / "in"), "--prior", prior, "--sigma-y", str(task.sigma_y)]
    arguments += ["--nfe", str(NFE), "-o", str(place / "out"), "--device", "cpu"]
    arguments += ["--method", method]
    if isinstance(task.operator, Inpaint):
        write_image(place / "mask.png", 2 * task.operator.mask.float() - 1)
        return [*arguments, "--task", "inpaint", "--mask", str(place / "mask.png")]
    if isinstance(task.operator, Blur):
        np.save(place / "kernel.npy", task.operator.kernel[0, 0].numpy())
        arguments += ["--task", "deblur", "--kernel", str(place / "kernel.npy")]
        return [*arguments, "--boundary", task.operator.boundary]
    assert isinstance(task.operator, SuperResolution)
    return [*arguments, "--task", "sr", "--scale", str(task.operator.factor)]


def command_seconds(arguments: list[str]) -> float:
    """Return the CPU seconds of a command, from reading its arguments to its last file."""
    began = time.process_time()
    with redirect_stdout(io.StringIO()):
        cli.app(arguments, standalone_mode=False)
    return time.process_time() - began


def profile(arguments: list[str]) -> None:
    """Print the functions that take most time."""
    watched = cProfile.Profile()
    watched.runcall(command_seconds, arguments)
    pstats.Stats(watched).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
