"""`ncvsd priors`: the priors that there are, and their cards."""

from typing import Annotated

import typer

from ncvsd_inverse import CheckpointError, list_priors
from ncvsd_inverse.cli.options import complete_prior
from ncvsd_inverse.plain_data import printable
from ncvsd_inverse.priors import PriorCard, PublishedPrior, describe_prior
from ncvsd_inverse.priors.files import search_folders
from ncvsd_inverse.priors.published import kept_file

__all__ = [
    "priors",
]


def priors(
    name: Annotated[
        str | None,
        typer.Argument(help="Print the card of this prior.", autocompletion=complete_prior),
    ] = None,
) -> None:
    """List the priors that there are, or print the card of one; no network is asked."""
    if name is not None:
        known = describe_prior(name)
        text = known.to_json() if isinstance(known, PriorCard) else _published_text(known)
        typer.echo(printable(text, lines=True))
        return
    for name in list_priors():
        typer.echo(printable(_line(name)))


def _line(name: str) -> str:
    """Return what a list says of a prior."""
    try:
        known = describe_prior(name)
    except (ValueError, CheckpointError) as error:
        return f"{name}: cannot be loaded, {error}"
    shape = "any size" if known.image_shape is None else "x".join(map(str, known.image_shape))
    if isinstance(known, PriorCard):
        return f"{name}: {shape}, {known.intended_use}"
    return f"{name}: {shape}, not on this machine; `ncvsd priors {name}` says more"


def _published_text(entry: PublishedPrior) -> str:
    """Return what is known of a published prior that is not ready on this machine."""
    kept = kept_file(entry)
    if kept is None:
        # The first folder is the package's own.
        folders = " or ".join(str(folder) for folder in search_folders()[1:])
        where = (
            "not on this machine; it is downloaded and converted when first used, or put "
            f"{entry.file} of {entry.repository}, as it is, into {folders}"
        )
    else:
        where = f"{kept}, converted when first used"
    lines = {
        "name": entry.name,
        "kind": entry.kind,
        "words": entry.words,
        "images": " x ".join(map(str, entry.image_shape)),
        "repository": f"{entry.repository} at Hugging Face",
        "revision": entry.revision or "recorded when first used",
        "file": f"{entry.file}, about {entry.megabytes} MB, a pickle that is never unpickled",
        "sha256": entry.sha256 or "recorded when first used",
        "where": where,
    }
    return "\n".join(f"{title}: {text}" for title, text in lines.items())
