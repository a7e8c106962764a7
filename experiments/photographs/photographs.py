r"""Photographs restored as users restore them, beside doing nothing, Wiener and total variation.

    python experiments/photographs/photographs.py --data DIR/natural/val.zip --out FOLDER
    python experiments/photographs/photographs.py --out FOLDER --write

Pictures are blurred before they are cropped, made small, made noisy, and given holes; `solve` is
told kernel, scale or mask and estimates the noise itself, as `ncvsd solve` does, and as there the
scene goes on beyond the edges of a blurred picture (Wiener and total variation repeat its border).
These two get the true noise, and a weight of the latter for each row that is the best of four by
PSNR on the first two photographs. Figures are
means over `--images` photographs: PSNR in dB, SSIM and lpips-alex. --write puts them into
README.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from baselines.classics import run_tv, run_wiener
from baselines.interface import Models, Problem
from ncvsd_inverse import load_prior, solve
from ncvsd_inverse.files import write_between, write_whole
from ncvsd_inverse.images import centre_crop, read_images, write_image
from ncvsd_inverse.metrics import lpips, psnr, ssim
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import (
    Blur,
    Denoise,
    GaussianBlur,
    Inpaint,
    MotionBlur,
    SuperResolution,
)
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.protocols import Denoiser

FOLDER = Path(__file__).parent
MARKS = ("<!-- written by photographs.py -->", "<!-- end of photographs.py -->")
PRIOR = "ncvsd_natural"
METHODS = ("input", "Wiener", "total variation", "teacher", "ours")
WEIGHTS = (3.0, 10.0, 30.0, 100.0)
TUNING = 2
SIDE = 144
RIM = 12


@dataclass(frozen=True)
class Case:
    """What is done to a photograph.

    Attributes:
        name: of its row.
        operator: photograph and its number -> the forward model that is told.
        sigma_y: noise std.
        blur: whether the photograph is blurred before it is cropped.
    """

    name: str
    operator: Callable[[Tensor, int], BaseOperator]
    sigma_y: float
    blur: bool = False

    @property
    def is_noise_only(self) -> bool:
        """Whether it is a matter of noise alone, for which the teacher is run too."""
        return self.name.startswith("noise")


def gaussian(std: float) -> Callable[[Tensor, int], BaseOperator]:
    """Return a maker of a Gaussian blur."""
    return lambda x, place: GaussianBlur(std, 2 * round(3.5 * std) + 1, "replicate")


def motion(x: Tensor, place: int) -> BaseOperator:
    """Return one of five motion blurs."""
    return MotionBlur(15, 0.5, seed=place % 5, boundary="replicate")


def scratches(x: Tensor, place: int) -> BaseOperator:
    """Return a mask of thin lines."""
    source = torch.Generator().manual_seed(place)
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    known = torch.ones(height, width, dtype=torch.bool)
    for angle, offset, wide in torch.rand(12, 3, generator=source).tolist():
        direction = math.pi * angle
        across = rows * math.cos(direction) + columns * math.sin(direction)
        low, high = float(across.min()), float(across.max())
        known &= (across - (low + offset * (high - low))).abs() > 0.7 + wide
    return Inpaint(known)


def text(x: Tensor, place: int) -> BaseOperator:
    """Return a mask of lines of letters."""
    from PIL import Image, ImageDraw

    height, width = x.shape[2:]
    picture = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(picture)
    for line in range(4, height, 18):
        draw.text((3 + line % 7, line), "the quick brown fox jumps over the lazy dog " * 3, fill=0)
    known = torch.tensor(list(picture.getdata())).view(height, width) > 127
    return Inpaint(known)


def holes(x: Tensor, place: int) -> BaseOperator:
    """Return a mask of eight round holes."""
    source = torch.Generator().manual_seed(100 + place)
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    known = torch.ones(height, width, dtype=torch.bool)
    for row, column, size in torch.rand(8, 3, generator=source).tolist():
        radius = 4 + 8 * size
        known &= (rows - row * height) ** 2 + (columns - column * width) ** 2 > radius**2
    return Inpaint(known)


CASES = (
    Case("blur, std 1, noise .005", gaussian(1), 0.005, blur=True),
    Case("blur, std 2, noise .02", gaussian(2), 0.02, blur=True),
    Case("blur, std 3, noise .05", gaussian(3), 0.05, blur=True),
    Case("motion, noise .005", motion, 0.005, blur=True),
    Case("motion, noise .02", motion, 0.02, blur=True),
    Case("SR x2", lambda x, place: SuperResolution(2), 0.0),
    Case("SR x3", lambda x, place: SuperResolution(3), 0.0),
    Case("SR x4", lambda x, place: SuperResolution(4), 0.0),
    Case("SR x2, noise .02", lambda x, place: SuperResolution(2), 0.02),
    Case("SR x4, noise .02", lambda x, place: SuperResolution(4), 0.02),
    Case("noise, std 5 of 255", lambda x, place: Denoise(), 2 * 5 / 255),
    Case("noise, std 25 of 255", lambda x, place: Denoise(), 2 * 25 / 255),
    Case("noise, std 50 of 255", lambda x, place: Denoise(), 2 * 50 / 255),
    Case("scratches", scratches, 0.0),
    Case("text", text, 0.0),
    Case("holes", holes, 0.0),
)


def pose(case: Case, photograph: Tensor, place: int) -> tuple[Tensor, Tensor, BaseOperator]:
    """Return truth, measurement (rounded to 8 bits) and the forward model that is told."""
    operator = case.operator(photograph, place)
    x = photograph
    source = make_generators([(7, place)])
    if case.blur:
        assert isinstance(operator, Blur)
        whole = Blur(operator.kernel, boundary="valid")
        y = whole(x)
        rows, columns = ((side - 1) // 2 for side in operator.kernel.shape[-2:])
        x = x[..., rows : rows + y.shape[2], columns : columns + y.shape[3]]
    else:
        y = operator(x)
    if case.sigma_y:
        y = y + case.sigma_y * torch.randn(y.shape, generator=source[0])
    rounded = ((y.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return x, operator.measured(rounded), operator


def nothing(case: Case, y: Tensor, x: Tensor, operator: BaseOperator) -> Tensor:
    """Return what a user has without restoring: the picture, enlarged by bicubic interpolation."""
    if y.shape == x.shape:
        return y
    return torch.nn.functional.interpolate(y, x.shape[2:], mode="bicubic").clamp(-1, 1)


def restore(
    method: str, case: Case, x: Tensor, y: Tensor, operator: BaseOperator, weight: float
) -> Tensor:
    """Return a method's restoration."""
    if method == "input":
        return nothing(case, y, x, operator)
    sigma = max(case.sigma_y, 0.004)
    if method == "teacher":
        teacher = load_prior(f"{PRIOR}_teacher")
        assert isinstance(teacher, Denoiser)
        return teacher.denoise(y, sigma)
    if method == "ours":
        if case.blur and isinstance(operator, Blur):
            operator = Blur(operator.kernel, boundary="valid")
        result = solve(y, operator=operator, prior=PRIOR, sigma_y="auto")
        return centre_crop(result.x0, (x.shape[2], x.shape[3]))
    problem = Problem.checked(y, operator, sigma_y=sigma, seed=0)
    models = Models(None, None)  # type: ignore[arg-type]
    if method == "Wiener":
        return run_wiener(problem, models, 0, {"std": 0.5, "exponent": 2.5})
    return run_tv(problem, models, 0, {"weight": weight})


def choose_weight(case: Case, photographs: list[Tensor]) -> float:
    """Return the weight of total variation that is best by PSNR."""
    models = Models(None, None)  # type: ignore[arg-type]

    def quality(weight: float) -> float:
        total = 0.0
        for place, photograph in enumerate(photographs[:TUNING]):
            x, y, operator = pose(case, photograph, place)
            problem = Problem.checked(y, operator, sigma_y=max(case.sigma_y, 0.004), seed=0)
            total += float(psnr(run_tv(problem, models, 0, {"weight": weight}), x))
        return total

    return max(WEIGHTS, key=quality)


def rim_and_inside(x0: Tensor, x: Tensor) -> tuple[float, float]:
    """Return PSNR of the outer pixels and of the others."""
    error = (x0.clamp(-1, 1) - x).square().mean(1)[0] / 4
    inner = torch.zeros_like(error, dtype=torch.bool)
    inner[RIM:-RIM, RIM:-RIM] = True
    return tuple(-10 * math.log10(float(error[part].mean())) for part in (~inner, inner))  # type: ignore[return-value]


def main() -> None:
    """Restore, and print rows; or write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="zip or folder of photographs")
    parser.add_argument("--images", type=int, default=24, help="how many (%(default)s)")
    parser.add_argument("--every", type=int, default=2, help="which of them (%(default)s)")
    parser.add_argument("--cases", nargs="+", type=int, help="numbers of rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    records = args.out / "photographs.json"
    found = json.loads(records.read_text(encoding="utf-8")) if records.exists() else {}
    if args.write:
        write_between(FOLDER / "README.md", MARKS, table(found))
        return
    pictures = list(read_images(args.data, args.images * args.every))[:: args.every]
    photographs = [centre_crop(x, (SIDE, SIDE)) for x in pictures]
    args.out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(CASES):
        if args.cases and number not in args.cases:
            continue
        methods = [name for name in args.methods if name != "teacher" or case.is_noise_only]
        needs_weight = "total variation" in methods
        weight = choose_weight(case, photographs) if needs_weight else math.nan
        rows: dict[str, list[list[float]]] = {name: [] for name in methods}
        for place, photograph in enumerate(photographs):
            x, y, operator = pose(case, photograph, place)
            for name in methods:
                x0 = restore(name, case, x, y, operator, weight).clamp(-1, 1)
                values = [psnr(x0, x), ssim(x0, x), lpips(x0, x, net="alex")]
                rows[name].append([*(float(value) for value in values), *rim_and_inside(x0, x)])
                if place < 3:
                    write_image(args.out / f"{number}_{place}_{name.split()[0]}.png", x0)
        found[case.name] = found.get(case.name, {}) | {
            name: [sum(column) / len(column) for column in zip(*values, strict=True)]
            for name, values in rows.items()
        }
        write_whole(records, json.dumps(found, indent=1) + "\n")
        print(case.name, f"weight {weight:g}" if needs_weight else "", flush=True)
        for name in methods:
            print("   ", name, " ".join(f"{v:.4g}" for v in found[case.name][name]), flush=True)


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return the rows as Markdown, the best PSNR and lpips bold."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for name in [case.name for case in CASES if case.name in found]:
        rows = found[name]
        best = max(values[0] for values in rows.values())
        nearest = min(values[2] for values in rows.values())
        cells = []
        for method in METHODS:
            if method not in rows:
                cells.append("")
                continue
            quality, similarity, distance, *_ = rows[method]
            shown = f"**{quality:.2f}**" if quality == best else f"{quality:.2f}"
            near = f"**{distance:.3f}**" if distance == nearest else f"{distance:.3f}"
            cells.append(f"{shown} {similarity:.3f} {near}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
