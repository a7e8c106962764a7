r"""What a restoration of a 512x512 image loses when its prior sees it in tiles.

    python experiments/large/tiles.py --data DIR/natural/val.zip --out experiments/large

Images are mosaics of the centres, 256x256, of four validation photographs each. Every task is
measured once and restored by `solve` with the whole image and with tiles, from the same seed: with
the same noise the two differ only by the tiles. The record holds the PSNR of both and the root
mean square difference within 8 pixels of the middles of the seams, where one tile's weight passes
that of the next, and over the image.
"""

import argparse
import json
import math
import platform
import time
from itertools import islice, pairwise, product
from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse import __version__, load_prior, solve
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors.tiled import tiled
from ncvsd_inverse.protocols import Prior
from ncvsd_inverse.tasks import Task, make_task

SIDE = 512
SEED = 0
TASKS = ("sr4x", "deblur_gaussian", "inpaint_random")


def main() -> None:
    """Restore, print and write `tiles.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or zip of photographs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 64, 256, 128])
    asked = parser.parse_args()
    truths = mosaics(asked.data, asked.images)
    prior = load_prior("ncvsd_natural")
    rows = []
    for name, nfe in product(TASKS, asked.nfe):
        task = make_task(name, SIDE)
        noise = make_generators([(SEED, i) for i in range(len(truths))])
        y = task.operator.measure(truths, task.sigma_y, generator=noise)
        whole, seconds = restore(task, y, prior, nfe)
        for tile, overlap in zip(asked.tiles[::2], asked.tiles[1::2], strict=True):
            cut, longer = restore(task, y, tiled(prior, tile, overlap), nfe)
            row = {"task": name, "nfe": nfe, "tile": tile, "overlap": overlap}
            row |= compare(whole, cut, truths, tile, overlap)
            row |= {"cpu_seconds_whole": seconds, "cpu_seconds_tiled": longer}
            rows.append(row)
            print(row)
    record = {"images": len(truths), "side": SIDE, "data": asked.data.name, "seed": SEED}
    record |= {"version": __version__, "machine": platform.machine(), "rows": rows}
    content = json.dumps(record, indent=1) + "\n"
    write_whole(asked.out / "tiles.json", content)


def restore(task: Task, y: Tensor, prior: Prior, nfe: int) -> tuple[Tensor, float]:
    """Return the restored images and the CPU seconds it took."""
    began = time.process_time()
    result = solve(y, operator=task.operator, prior=prior, nfe=nfe, estimate="sample", seed=SEED)
    return result.x0, time.process_time() - began


def mosaics(data: Path, num: int) -> Tensor:
    """Return images of four photographs each, shape (num, 3, 512, 512)."""
    half = SIDE // 2
    large = (x for x in read_images(data) if min(x.shape[2:]) >= half)
    parts = torch.cat([centre_crop(x, (half, half)) for x in islice(large, 4 * num)])
    rows = torch.cat([parts[0::2], parts[1::2]], dim=3)
    return torch.cat([rows[0::2], rows[1::2]], dim=2)


def compare(
    whole: Tensor, cut: Tensor, truths: Tensor, tile: int, overlap: int
) -> dict[str, float]:
    """Return PSNR in dB, lowest of the images and worst loss, and differences, image units."""
    losses = psnr(whole, truths) - psnr(cut, truths)
    squares = (whole - cut).square().mean((0, 1))
    # A seam lies in the middle of what two tiles share.
    starts = [*range(0, SIDE - tile, tile - overlap), SIDE - tile]
    middles = [(start + before + tile) / 2 for before, start in pairwise(starts)]
    places = torch.arange(SIDE) + 0.5
    near = torch.stack([(places - middle).abs() < 8 for middle in middles]).any(0)
    seams = near[:, None] | near
    return {
        "psnr_whole": float(psnr(whole, truths).mean()),
        "psnr_tiled": float(psnr(cut, truths).mean()),
        "largest_change_db": float(losses.abs().max()),
        "rms_difference": math.sqrt(float(squares.mean())),
        "rms_difference_at_seams": math.sqrt(float(squares[seams].mean())),
        "largest_difference": float((whole - cut).abs().max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
