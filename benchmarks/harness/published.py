"""Published results that stand beside the benchmark's own, and the works that are cited."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

__all__ = [
    "ABSENT",
    "CAPTION",
    "NOTES",
    "PUBLISHED",
    "REFERENCES",
    "SCORE_NAMES",
    "PublishedRow",
    "Reference",
    "Scores",
    "published_rows",
    "read_references",
    "show_scores",
]

ABSENT = "\N{EN DASH}"
"""What stands in tables where there is no number."""

REFERENCES = Path(__file__).parent.parent / "references.bib"
"""The works that methods, metrics and published rows name by key."""

Scores: TypeAlias = tuple[float | None, float | None, float | None]
"""LPIPS (VGG), PSNR in dB, SSIM; None where nothing was reported."""

SCORE_NAMES = ("LPIPS-VGG", "PSNR", "SSIM")

CAPTION = (
    "Published results on other images: FFHQ at 256x256, 100 images, sigma_y 0.05, LPIPS of VGG "
    "features. Not comparable with the rows measured here."
)

NOTES = (
    "All rows are as Tables 2 and 5 of the NCVSD paper give them. Calls are as published: NCVSD's "
    "code makes 49 where it says 50.",
    "Phase retrieval is the best of 4 runs. NCVSD's public code chooses it with the truth and "
    "counts one run of the four (196 calls).",
    "DAPS and PnP-DM were run by the NCVSD paper's authors with the code of each, whose operators "
    "differ: DAPS blurs with reflect padding and pads phase retrieval to 384 pixels a side, NCVSD "
    "blurs circularly and pads to 512, PnP-DM's super-resolution averages blocks.",
    "DPS and DDRM were taken by the NCVSD paper from the DAPS paper.",
)


@dataclass(frozen=True)
class PublishedRow:
    """What was reported of a method.

    Attributes:
        title: name of the method.
        reference: its BibTeX key.
        nfe: network passes an image, as published.
        measured_by: BibTeX key of the paper whose authors measured it; None if not known.
        scores: by task name.
    """

    title: str
    reference: str
    nfe: int
    measured_by: str | None
    scores: Mapping[str, Scores]


PUBLISHED = (
    PublishedRow(
        "PnP-GD (NCVSD)",
        "peng2025ncvsd",
        50,
        "peng2025ncvsd",
        {
            "inpaint_box": (0.128, 21.75, 0.814),
            "deblur_gaussian": (0.155, 27.06, 0.777),
            "deblur_motion": (0.160, 28.02, 0.801),
            "sr4x": (0.151, 27.93, 0.805),
            "phase_retrieval": (0.186, 27.82, 0.797),
        },
    ),
    PublishedRow(
        "DAPS",
        "zhang2025daps",
        1000,
        "peng2025ncvsd",
        {
            "inpaint_box": (0.133, 24.07, 0.814),
            "deblur_gaussian": (0.165, 29.19, 0.817),
            "deblur_motion": (0.157, 29.66, 0.847),
            "sr4x": (0.177, 29.07, 0.818),
            "phase_retrieval": (0.140, 29.94, 0.851),
        },
    ),
    PublishedRow(
        "PnP-DM",
        "wu2024pnpdm",
        2483,
        "peng2025ncvsd",
        {
            "deblur_gaussian": (0.191, 27.81, 0.780),
            "deblur_motion": (0.183, 28.23, 0.795),
            "sr4x": (0.190, 27.77, 0.787),
            "phase_retrieval": (0.364, 22.39, 0.628),
        },
    ),
    PublishedRow(
        "DWT-Var",
        "peng2024dwtvar",
        99,
        None,
        {
            "inpaint_box": (0.158, 21.26, 0.796),
            "deblur_gaussian": (0.186, 27.70, 0.795),
            "deblur_motion": (0.189, 28.06, 0.798),
            "sr4x": (0.187, 27.78, 0.802),
        },
    ),
    PublishedRow(
        "DiffPIR",
        "zhu2023diffpir",
        100,
        None,
        {
            "inpaint_box": (0.186, 25.02, None),
            "deblur_gaussian": (0.236, 27.36, None),
            "deblur_motion": (0.255, 26.57, None),
            "sr4x": (0.260, 26.64, None),
        },
    ),
    PublishedRow(
        "PiGDM",
        "song2023pigdm",
        99,
        None,
        {
            "inpaint_box": (0.284, 21.76, 0.663),
            "deblur_gaussian": (0.245, 25.72, 0.720),
            "deblur_motion": (0.240, 26.29, 0.733),
            "sr4x": (0.245, 25.69, 0.720),
        },
    ),
    PublishedRow(
        "DPS",
        "chung2023dps",
        1000,
        "zhang2025daps",
        {
            "inpaint_box": (0.198, 23.32, 0.792),
            "deblur_gaussian": (0.211, 25.52, 0.764),
            "deblur_motion": (0.270, 23.14, 0.801),
            "sr4x": (0.260, 24.38, 0.753),
            "phase_retrieval": (0.410, 17.64, 0.441),
        },
    ),
    PublishedRow(
        "DDRM",
        "kawar2022ddrm",
        100,
        "zhang2025daps",
        {
            "inpaint_box": (0.159, 22.37, 0.801),
            "deblur_gaussian": (0.236, 23.36, 0.732),
            "deblur_motion": (None, None, 0.512),
            "sr4x": (0.210, 27.65, 0.782),
        },
    ),
)


def published_rows(task: str) -> list[tuple[PublishedRow, Scores]]:
    """Return the rows that report a task, with their scores there."""
    return [(row, row.scores[task]) for row in PUBLISHED if task in row.scores]


def show_scores(scores: Scores) -> list[str]:
    """Return scores as text, with as many digits as are published."""
    return [
        ABSENT if score is None else f"{score:.{decimals}f}"
        for score, decimals in zip(scores, (3, 2, 3), strict=True)
    ]


@dataclass(frozen=True)
class Reference:
    """A work as a BibTeX file gives it.

    Attributes:
        key: by which it is cited.
        fields: its fields, without their outer braces.
        text: the entry as it stands in the file.
    """

    key: str
    fields: Mapping[str, str]
    text: str

    def plain(self) -> str:
        """Return authors, title, venue and year as one line of text."""
        names = [_plain(name) for name in self.fields["author"].split(" and ")]
        people = [" ".join(reversed(name.split(", ", 1))) for name in names]
        shown = people if len(people) <= 4 else [people[0], "et al."]
        venue = next(
            (
                self.fields[name]
                for name in ("booktitle", "journal", "publisher")
                if name in self.fields
            ),
            f"arXiv {self.fields['eprint']}" if "eprint" in self.fields else "",
        )
        place = ", ".join(part for part in (_plain(venue), self.fields.get("year", "")) if part)
        parts = (", ".join(shown).removesuffix("."), _plain(self.fields["title"]), place)
        return ". ".join(part for part in parts if part) + "."


def _plain(text: str) -> str:
    plain = text.replace("{", "").replace("}", "")
    return plain.replace("---", "\N{EM DASH}").replace("--", "\N{EN DASH}")


_ENTRY = re.compile(r"^@(?P<kind>\w+)\{(?P<key>[^\s,{}]+),", re.MULTILINE)
_FIELD = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?=\{)")


def read_references(path: Path = REFERENCES) -> dict[str, Reference]:
    """Read a BibTeX file whose entries begin a line and whose fields are in braces.

    Returns:
        Its entries by key, in the order of the file.

    Raises:
        ValueError: if a brace is not closed, a key comes twice, or a field is not `name = {text}`.
    """
    text = path.read_text(encoding="utf-8")
    found: dict[str, Reference] = {}
    for match in _ENTRY.finditer(text):
        key = match["key"]
        if key in found:
            raise ValueError(f"{path.name} must hold each key once, got {key} again")
        end = _closing_brace(text, text.index("{", match.start()), key)
        fields = _read_fields(text[match.end() : end], key)
        found[key] = Reference(key, fields, text[match.start() : end + 1])
    return found


def _read_fields(body: str, key: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    at = 0
    while body[at:].strip(" \n,"):
        match = _FIELD.match(body, at)
        if match is None or match["name"] in fields:
            raise ValueError(f"{key} must hold fields `name = {{text}}`, got {body[at:].strip()!r}")
        end = _closing_brace(body, match.end(), key)
        fields[match["name"]] = " ".join(body[match.end() + 1 : end].split())
        at = end + 1
        at += body.startswith(",", at)
    return fields


def _closing_brace(text: str, start: int, key: str) -> int:
    """Return where the brace that opens at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise ValueError(f"{key} must close its braces")
