r"""Pictures restored from blurs that nobody knows, beside the same with the kernel known.

    python experiments/blind/blind.py faces --data DIR/faces64/val.zip --out FOLDER
    python experiments/blind/blind.py photographs --data DIR/natural/val.zip --out FOLDER
    python experiments/blind/blind.py --out FOLDER --write

Faces are blurred as if periodic, by kernels of 9 to 21 pixels, and solved for one of 21.
Photographs are blurred before they are cut to 128x128 pixels, by kernels of 9 to 31 pixels, and
solved for one of 31 that repeats the edge. Picture i has kernel i, of six of motion, two Gaussians
and two discs, over and over. A kernel and a picture can move against each other, so each picture
is moved, by quarters of a pixel, to where it is nearest to the truth, whatever made it, and the
outer pixels do not count. The classical ways are scikit-image's unsupervised Wiener filter and
Richardson-Lucy, both with a guessed Gaussian of std 1.5, where scikit-image is there. A stopped
run goes on with the same command; --write puts the tables into README.md.
"""

import argparse
import importlib
import importlib.util
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse import load_prior, solve
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.files import write_between, write_whole
from ncvsd_inverse.images import centre_crop, read_images, write_image
from ncvsd_inverse.metrics import lpips, psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import BlindBlur, Blur, GaussianBlur, MotionBlur
from ncvsd_inverse.operators.blind import FAMILIES
from ncvsd_inverse.protocols import Prior

FOLDER = Path(__file__).parent
MARKS = ("<!-- written by blind.py -->", "<!-- end of blind.py -->")
NOISES = (0.01, 0.03)
CALLS = (20, 50)
SIDE, RIM = 128, 8
SETS = {"faces": "ncvsd_faces64", "photographs": "ncvsd_natural"}
LARGEST = {"faces": 21, "photographs": 31}
MOTIONS = {
    "faces": ((9, 0.5, 1), (11, 0.3, 12), (13, 0.5, 3), (15, 0.5, 4), (17, 0.7, 5), (21, 0.4, 6)),
    "photographs": (
        (9, 0.5, 1),
        (13, 0.3, 12),
        (17, 0.5, 3),
        (21, 0.5, 4),
        (25, 0.7, 5),
        (31, 0.4, 6),
    ),
}
"""Size, intensity and seed of `MotionBlur`."""
ROUND = {
    "faces": (("gaussian", 1.2, 9), ("gaussian", 2.0, 13), ("defocus", 2.5, 9), ("defocus", 4, 13)),
    "photographs": (
        ("gaussian", 1.5, 11),
        ("gaussian", 3.0, 21),
        ("defocus", 3.0, 11),
        ("defocus", 6.0, 17),
    ),
}
"""Family, its number and size."""


def kernels(name: str) -> list[Tensor]:
    """Return the ten kernels of a set, float64."""
    moved = [MotionBlur(size, rate, seed=seed).kernel[0, 0] for size, rate, seed in MOTIONS[name]]
    return moved + [FAMILIES[law].draw([number], size) for law, number, size in ROUND[name]]


def pose(name: str, picture: Tensor, kernel: Tensor, noise: float, key: int) -> tuple[Tensor, Blur]:
    """Return truth and measurement with the blur that made it, as a solver may be told."""
    generator = make_generators([(11, key)])
    if name == "faces":
        blur = Blur(kernel.float())
        return torch.cat((picture, blur.measure(picture, noise, generator=generator))), blur
    half = len(kernel) // 2
    whole = centre_crop(picture, (SIDE + 2 * half, SIDE + 2 * half))
    y = Blur(kernel.float(), "valid").measure(whole, noise, generator=generator)
    x = whole[..., half : half + SIDE, half : half + SIDE]
    return torch.cat((x, y)), Blur(kernel.float(), "replicate")


def moved(x: Tensor, down: float, right: float) -> Tensor:
    """Return images moved by parts of a pixel, as if periodic."""
    rows = torch.fft.fftfreq(x.shape[2])[:, None] * down
    columns = torch.fft.rfftfreq(x.shape[3]) * right
    waves = torch.fft.rfft2(x) * torch.exp(-2j * math.pi * (rows + columns))
    images: Tensor = torch.fft.irfft2(waves, s=x.shape[2:])
    return images


def aligned(x0: Tensor, x: Tensor) -> Tensor:
    """Return a picture where it is nearest to the truth, without its rim."""
    first, second = (torch.fft.rfft2(each - each.mean()) for each in (x0, x))
    match = torch.fft.irfft2((first.conj() * second).sum((0, 1)), s=x.shape[2:])
    row, column = divmod(int(match.argmax()), x.shape[3])
    quarters = [step / 4 for step in range(-4, 5)]
    places = [moved(x0, row + down, column + right) for down in quarters for right in quarters]
    best = max(places, key=lambda place: float(psnr(inner(place), inner(x))))
    return inner(best).clamp(-1, 1)


def inner(x: Tensor) -> Tensor:
    """Return a picture without its rim."""
    return x[..., RIM:-RIM, RIM:-RIM]


def similarity(found: Tensor, kernel: Tensor) -> float:
    """Return the largest normalised cross-correlation of two kernels."""
    first, second = (torch.fft.rfft2(each.double(), s=(64, 64)) for each in (found, kernel))
    product = torch.fft.irfft2(first.conj() * second, s=(64, 64)).max()
    return float(product / (found.double().norm() * kernel.double().norm()))


def classics(y: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what scikit-image makes of a picture, if it is there."""
    if importlib.util.find_spec("skimage") is None:
        return
    restoration: Any = importlib.import_module("skimage.restoration")
    guess = GaussianBlur(1.5, 13).kernel[0, 0].numpy()
    channels = ((y[0] + 1) / 2).numpy().astype(np.float64)
    wiener = [restoration.unsupervised_wiener(each, guess, rng=0)[0] for each in channels]
    lucy = [restoration.richardson_lucy(each.clip(0, 1), guess, 20) for each in channels]
    for name, found in (("Wiener", wiener), ("Richardson-Lucy", lucy)):
        yield name, torch.from_numpy(np.stack(found)).float()[None] * 2 - 1


def figures(x0: Tensor, x: Tensor) -> dict[str, float]:
    """Return what a picture is worth."""
    near, truth = aligned(x0, x), inner(x)
    return {
        "psnr": float(psnr(near, truth)),
        "lpips": float(lpips(near, truth, net="alex")),
        "sse": float((near - truth).square().sum()),
    }


def restore(
    name: str, prior: Prior, x: Tensor, y: Tensor, blur: Blur, noise: float, calls: tuple[int, ...]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the figures of all methods for one measurement, and pictures."""
    rows: dict[str, Any] = {"nothing": figures(y, x)}
    pictures = [x, y]
    for method, x0 in classics(y):
        rows[method] = figures(x0, x)
    for nfe in calls:
        known = solve(y, operator=blur, prior=prior, nfe=nfe, sigma_y=noise)
        unknown = BlindBlur(LARGEST[name], blur.boundary)
        blind = solve(y, operator=unknown, prior=prior, nfe=nfe, sigma_y="auto")
        assert blind.kernel is not None
        assert blind.kernel_std is not None
        rows[f"known {nfe}"] = figures(known.x0, x)
        rows[f"blind {nfe}"] = figures(blind.x0, x) | {
            "similarity": similarity(blind.kernel[0, 0], blur.kernel[0, 0]),
            "residual": float(blind.residual),
            "spread": float(blind.kernel_std.norm() / blind.kernel.norm()),
            "noise": float(blind.sigma_y),
        }
        shown = torch.full_like(x, -1)
        for place, kernel in ((0, blur.kernel), (32, blind.kernel)):
            rows_, columns = kernel.shape[2:]
            shown[..., place : place + rows_, :columns] = 2 * kernel / kernel.max() - 1
        pictures += [known.x0, blind.x0, shown]
    return rows, pictures


def main() -> None:
    """Restore, or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", nargs="?", choices=SETS, help="what is restored")
    parser.add_argument("--data", type=Path, help="zip or folder of pictures")
    parser.add_argument("--images", type=int, help="how many (64 faces, 24 photographs)")
    parser.add_argument(
        "--skip", type=int, default=0, help="pictures left out before (%(default)s)"
    )
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="of each chain (20 50)")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "blind.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.write:
        write_between(FOLDER / "README.md", MARKS, tables(found))
        return
    prior, laws = load_prior(SETS[args.set]), kernels(args.set)
    count = args.images or {"faces": 64, "photographs": 24}[args.set]
    for number, picture in enumerate(read_images(args.data, args.skip + count)):
        if number < args.skip:
            continue
        for noise in NOISES:
            known = found.get(f"{args.set} {number} {noise:g}", {})
            left = tuple(nfe for nfe in args.calls if f"blind {nfe}" not in known)
            if not left:
                continue
            both, blur = pose(args.set, picture, laws[number % len(laws)], noise, number)
            x, y = both[:1], both[1:]
            try:
                rows, pictures = restore(args.set, prior, x, y, blur, noise, left)
            except DivergenceError as error:
                print(args.set, number, noise, f"left out: {error}", flush=True)
                continue
            found[f"{args.set} {number} {noise:g}"] = known | rows
            write_image(args.out / f"{args.set}_{number}_{noise:g}.png", torch.cat(pictures, 3))
            write_whole(path, json.dumps(found, indent=1) + "\n")
            name = f"blind {left[-1]}"
            shown = {key: round(value, 3) for key, value in rows[name].items()}
            print(args.set, number, noise, shown, flush=True)


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for name in SETS:
        for noise in NOISES:
            rows = {
                int(key.split()[1]): row
                for key, row in found.items()
                if key.startswith(f"{name} ") and key.endswith(f" {noise:g}")
            }
            if rows:
                parts.append(table(f"{len(rows)} {name}, noise {noise:g}", list(rows.values())))
    return "\n\n".join(parts)


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Return the table of one set and noise."""
    columns = "PSNR | lpips-alex | within 1.5 dB | within 25% | similarity | error ratio < 3"
    lines = [f"| {title} | {columns} | residual |", "|---" * 8 + "|"]
    for method in dict.fromkeys(key for row in rows for key in row):
        have = [row for row in rows if method in row]
        values = [row[method] for row in have]
        cells = [f"{statistics.fmean(v['psnr'] for v in values):.2f}"]
        cells.append(f"{statistics.fmean(v['lpips'] for v in values):.3f}")
        if method.startswith("blind"):
            pairs = [(row[method], row[method.replace("blind", "known")]) for row in have]
            near = [ours["psnr"] > known["psnr"] - 1.5 for ours, known in pairs]
            alike = [ours["lpips"] < 1.25 * known["lpips"] for ours, known in pairs]
            low = [ours["sse"] < 3 * known["sse"] for ours, known in pairs]
            cells += [f"{statistics.fmean(share):.0%}" for share in (near, alike)]
            cells.append(f"{statistics.median(v['similarity'] for v in values):.2f}")
            cells.append(f"{statistics.fmean(low):.0%}")
            cells.append(f"{statistics.median(v['residual'] for v in values):.2f}")
        lines.append(f"| {method} | " + " | ".join([*cells, *[""] * (7 - len(cells))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
