r"""Measure the statistics by which `solve` conditions a prior's draws, and put them into its card.

    python experiments/covariance/measure.py ncvsd_inverse/priors/weights/ncvsd_faces64 \
        --val DIR/faces64/val.zip --images 256

Draws are held against validation images at nine noise levels; see
`ncvsd_inverse.covariance.measure_statistics`. Prints the std of a pixel that each level leaves
open. A new network asks for new statistics.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

from ncvsd_inverse.covariance import ImageStatistics, measure_statistics
from ncvsd_inverse.images import centre_crop, read_images, write_atomically
from ncvsd_inverse.priors import load_prior


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prior", type=Path, help="path of the prior, without suffix")
    parser.add_argument("--val", type=Path, required=True, help="zip or folder of images")
    parser.add_argument("--images", type=int, default=256, help="how many (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of crops (%(default)s)")
    args = parser.parse_args()
    prior = load_prior(args.prior)
    size = (args.size, args.size) if prior.image_shape is None else prior.image_shape[1:]
    images = torch.cat([centre_crop(x, size) for x in read_images(args.val, args.images)])
    statistics = measure_statistics(prior, images)
    print(f"{args.prior.name}: {len(images)} images of {size[0]}x{size[1]}")
    for line in describe(statistics, images):
        print(line)
    assert prior.card is not None
    text = replace(prior.card, statistics=statistics).to_json()
    write_atomically(args.prior.with_suffix(".json"), lambda file: file.write(text.encode("utf-8")))


def describe(statistics: ImageStatistics, like: torch.Tensor) -> list[str]:
    """Return the std of a pixel given a view at each level, and without one."""
    lines = []
    for sigma in (*statistics.levels, math.inf):
        covariance = statistics.covariance(sigma, like[:1])
        noise = torch.randn(16, *like.shape[1:], generator=torch.Generator().manual_seed(0))
        lines.append(f"  sigma {sigma:g}: std {float(covariance.colour(noise).std()):.4f}")
    return lines


if __name__ == "__main__":
    main()
