"""The priors that their authors publish: what they are, fetched and converted once."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import file_sha256, whole_files
from ncvsd_inverse.priors.convert import convert as own_convert
from ncvsd_inverse.priors.files import (
    WEIGHTS_VARIABLE,
    accepted_file,
    card_path,
    converted_stem,
    read_card,
    record_path,
    search_folders,
    weights_path,
)

__all__ = [
    "PUBLISHED",
    "PublishedPrior",
    "check_published_kind",
    "convert_once",
    "fetch_published",
    "kept_file",
]

Converter: TypeAlias = Callable[[Path, Path], object]
"""Writes a foreign checkpoint (its path) as a prior (the path of both files without suffix)."""


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


def kept_file(entry: PublishedPrior) -> Path | None:
    """Return where a published file lies that was fetched by hand, None without one."""
    paths = (folder / entry.file for folder in search_folders())
    return next((path for path in paths if path.is_file()), None)


def check_published_kind(name: str, stem: Path, source: Path | None = None) -> None:
    """CheckpointError unless the card at `stem` is of the kind that is published as `name`.

    Args:
        name: a key of `PUBLISHED`.
        stem: path of the prior, without suffix.
        source: the file that it was converted from, if that is what should go.
    """
    kind, came = PUBLISHED[name].kind, read_card(stem).kind
    if came != kind:
        raise CheckpointError(
            f"{name} must be a prior of kind {kind!r}, got one of kind {came!r}: delete "
            f"{source or card_path(stem)}, which came under the wrong name"
        )


_fetching = threading.RLock()
"""Held while a checkpoint is fetched or converted: threads that want one file do it once."""


def fetch_published(name: str, convert: Converter | None = None) -> Path:
    """Return the path, without suffix, of a prior that its authors publish as a pickle.

    The first time the pickle is looked for in the folders of priors, then downloaded, and
    converted once for its content; later nothing but the result is needed. SHA-256 and, of a
    download, the commit are recorded then: a file of another SHA-256 is refused from there on.

    Args:
        name: a key of `PUBLISHED`.
        convert: what converts it; None: `ncvsd_inverse.priors.convert.convert`.

    Raises:
        CheckpointError: if the file cannot be had or converted, which says what to fetch; if it is
            not the one that is known, or a prior of another kind.
    """
    with _fetching:
        return _fetched(PUBLISHED[name], convert)


def _fetched(entry: PublishedPrior, convert: Converter | None) -> Path:
    name = entry.name
    record, accepted = record_path(name), accepted_file(name)
    digest, revision = accepted or (None, None)
    source = kept_file(entry)
    if source is None and digest is not None:
        stem = converted_stem(digest, name)
        if card_path(stem).is_file():
            check_published_kind(name, stem)
            return stem
    if source is None:
        source = _download(entry, entry.revision or revision)
        commit = source.parent.name
        revision = commit if re.fullmatch("[0-9a-f]{40}", commit) else None
    came, wanted = _checked_sha256(source), entry.sha256 or digest
    if wanted is not None and came != wanted:
        way_out = f"delete {source} to stay with that one"
        if entry.sha256 is None:
            way_out += f", or {record} to accept this one from now on"
        raise CheckpointError(
            f"{source} must have the SHA-256 of the {entry.file} that is known as {name}, "
            f"{wanted}, got {came}; {way_out}"
        )
    stem = _converted(source, came, name, convert)
    try:
        check_published_kind(name, stem, source)
    except CheckpointError:
        for path in (card_path(stem), weights_path(stem)):
            path.unlink(missing_ok=True)
        raise
    if accepted is None:
        with whole_files(record) as (text,):
            text.write_text(f"{came} {revision or ''}".strip() + "\n", encoding="utf-8")
    return stem


def convert_once(source: Path, name: str, convert: Converter | None = None) -> Path:
    """Convert a foreign checkpoint, unless its content was before; return where, without suffix.

    Args:
        source: the checkpoint, one file.
        name: what the prior is called.
        convert: what converts it; None: `ncvsd_inverse.priors.convert.convert`.

    Raises:
        CheckpointError: if the file is damaged or cannot be converted.
    """
    with _fetching:
        return _converted(source, _checked_sha256(source), name, convert)


def _converted(source: Path, sha256: str, name: str, convert: Converter | None) -> Path:
    stem = converted_stem(sha256, name)
    if not card_path(stem).is_file():
        stem.parent.mkdir(parents=True, exist_ok=True)
        (convert or own_convert)(source, stem)
        read_card(stem)
    return stem


def _checked_sha256(source: Path) -> str:
    """Return the SHA-256 of a file; CheckpointError if it is kept under another one."""
    digest = file_sha256(source)
    # Hugging Face keeps large files under their own SHA-256.
    expected = source.resolve().name
    if re.fullmatch("[0-9a-f]{64}", expected) and digest != expected:
        raise CheckpointError(f"{source} is damaged: its SHA-256 is {digest}; delete it to retry")
    return digest


def _download(entry: PublishedPrior, revision: str | None) -> Path:
    # Loaded when a file is to be fetched: huggingface_hub is slow to import.
    from huggingface_hub import hf_hub_url

    from ncvsd_inverse.priors.hub import Repository

    try:
        return Repository(entry.repository, revision).get(entry.file)
    except CheckpointError as error:
        url = hf_hub_url(entry.repository, entry.file, revision=revision)
        raise CheckpointError(
            f"{entry.name} is not here and cannot be downloaded: {error}; where there is a "
            f"network, fetch {url} and put it, as it is, into one of "
            f"{', '.join(str(folder) for folder in search_folders())} "
            f"(${WEIGHTS_VARIABLE} may name another folder); it is a pickle, which is "
            "never unpickled but converted, once, when the prior is next used"
        ) from error
