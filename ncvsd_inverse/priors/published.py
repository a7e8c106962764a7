"""The priors that their authors publish."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PublishedPrior:
    """What is known of a published prior before it is on this machine.

    Attributes:
        name: what `load_prior` calls it.
        kind: "ncvsd" (a distilled network) or "diffusion" (a teacher, sampled by diffusion); the
            converted file must be of this kind.
        repository: "owner/name" at Hugging Face.
        file: the file there, a pickle that is converted and never unpickled.
        image_shape: the one image shape (C, H, W) it takes.
        megabytes: size of the file, about.
        words: what it is, and on what terms.
        revision: commit of the repository; None: no source states one, and the commit of the
            first download is recorded.
        sha256: SHA-256 of the file; None: likewise.
    """

    name: str
    kind: Literal["ncvsd", "diffusion"]
    repository: str
    file: str
    image_shape: tuple[int, int, int]
    megabytes: int
    words: str
    revision: str | None = None
    sha256: str | None = None


_TERMS = (
    "Its authors' terms hold; FFHQ, the images of its training, is for non-commercial use "
    "(CC BY-NC-SA 4.0)."
)

PUBLISHED = {
    entry.name: entry
    for entry in (
        PublishedPrior(
            name="ncvsd_ffhq",
            kind="ncvsd",
            repository="xypeng9903/ncvsd",
            file="ncvsd-ffhq256-xs.pkl",
            image_shape=(3, 256, 256),
            megabytes=292,
            words="Generative denoiser of FFHQ faces, distilled by Peng et al., arXiv 2506.09416. "
            + _TERMS,
        ),
        PublishedPrior(
            name="ncvsd_ffhq_teacher",
            kind="diffusion",
            repository="xypeng9903/ncvsd",
            file="edm2-ffhq256-xs.pkl",
            image_shape=(3, 256, 256),
            megabytes=225,
            words="EDM2 denoiser of FFHQ faces, the teacher of ncvsd_ffhq, arXiv 2506.09416. "
            + _TERMS,
        ),
    )
}
"""By name. Sizes: two bytes a parameter, as the networks' names and shapes count them."""
