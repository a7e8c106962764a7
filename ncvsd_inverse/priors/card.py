"""The card of a trained prior: what it is, where it comes from, what it is good for."""

import hashlib
import json
import re
import string
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self

from ncvsd_inverse.checks import check_choice, check_names, check_noise_scale
from ncvsd_inverse.plain_data import parse_json
from ncvsd_inverse.priors.statistics import ImageStatistics
from ncvsd_inverse.protocols import Point, Points

__all__ = [
    "PriorCard",
]

OPTIONAL = ("noise_scale", "tempers", "statistics", "points")
"""Fields that a card may leave out."""

MAX_FLOAT = sys.float_info.max

_OTHER = "other"
"""How JSON names operators of all families that have no row of their own."""


@dataclass(frozen=True, kw_only=True)
class PriorCard:
    """What is known of a trained prior; stored as JSON beside its weights.

    Attributes:
        name: the prior's name.
        kind: "ncvsd" (a distilled network) or "diffusion" (a teacher, sampled by diffusion).
        network: configuration that `networks.build_network` takes.
        image_shape: the one image shape (C, H, W) it takes, or None when any size works.
        gamma: how far an "ncvsd" prior raises the noise level, >= 0; None for "diffusion".
        sigma_min: smallest trained noise std, > 0, image units.
        sigma_max: largest trained noise std, image units.
        sha256: SHA-256 of the weights file, 64 lower-case hexadecimal digits.
        licence: terms of use of the weights.
        data: what it was trained on.
        training: command, commit and settings of the training.
        evaluation: measured quality.
        weaknesses: what it does badly.
        intended_use: what it is for.
        noise_scale: pairs (sigma, factor) of an "ncvsd" prior, see `NCVSDPrior`; may be left
            out.
        tempers: whether an "ncvsd" prior was trained to temper, see `NCVSDPrior`; may be left out.
        statistics: mean and covariances of its images, or None; may be left out.
        points: settings of point estimates by operator family and network calls, or None; in JSON
            {family, or "other": {calls: {temperature, ...}}}; may be left out.

    Raises:
        ValueError: if a field has a wrong type or is out of range.
    """

    name: str
    kind: Literal["ncvsd", "diffusion"]
    network: Mapping[str, object]
    image_shape: tuple[int, int, int] | None
    gamma: float | None
    sigma_min: float
    sigma_max: float
    sha256: str
    licence: str
    data: str
    training: Mapping[str, object]
    evaluation: Mapping[str, object]
    weaknesses: str
    intended_use: str
    noise_scale: tuple[tuple[float, float], ...] = ()
    tempers: bool = False
    statistics: ImageStatistics | None = None
    points: Points | None = None

    def __post_init__(self) -> None:
        for field in ("name", "licence", "data", "weaknesses", "intended_use"):
            _check_text(field, getattr(self, field))
        if not self.name.isprintable():
            raise ValueError(f"name must have no control characters, got {self.name!a}")
        for field in ("network", "training", "evaluation"):
            _check_mapping(field, getattr(self, field))
        check_choice("kind", self.kind, ("ncvsd", "diffusion"))
        _check_text("network['kind']", self.network.get("kind"))
        if self.image_shape is not None:
            _check_image_shape(self.image_shape)
        for field in ("sigma_min", "sigma_max"):
            _check_positive_number(field, getattr(self, field))
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min must be below sigma_max = {self.sigma_max}, got {self.sigma_min}"
            )
        if self.kind == "ncvsd":
            _check_positive_number("gamma", self.gamma, or_zero=True)
        elif self.gamma is not None:
            raise ValueError(f"gamma must be null for kind 'diffusion', got {self.gamma!r}")
        check_noise_scale("noise_scale", self.noise_scale)
        if not isinstance(self.tempers, bool):
            raise ValueError(f"tempers must be true or false, got {self.tempers!r}")
        if not isinstance(self.statistics, ImageStatistics | None):
            raise ValueError(f"statistics must be ImageStatistics, got {self.statistics!r}")
        if self.points is not None:
            _check_points(self.points)
        digits = set(string.hexdigits.lower())
        if (
            not (isinstance(self.sha256, str) and len(self.sha256) == 64)
            or set(self.sha256) - digits
        ):
            raise ValueError(
                f"sha256 must be 64 lower-case hexadecimal digits, got {self.sha256!r}"
            )

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights and of the scale of their noise: what draws follow from."""
        if not self.noise_scale:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.noise_scale}".encode()).hexdigest()

    @classmethod
    def from_dict(cls, entries: object) -> Self:
        """Build a card from what JSON gives.

        Raises:
            ValueError: if `entries` is no dictionary, lacks a field, has an unknown one, or a
                field is wrong.
        """
        if not isinstance(entries, dict):
            raise ValueError(f"a card must be a JSON object, got {type(entries).__name__}")
        if "spread" in entries:  # its name in cards of version 0.1
            entries = {**entries, "noise_scale": entries["spread"]}
            del entries["spread"]
        known = [field.name for field in fields(cls)]
        check_names("a card", entries, known, [name for name in known if name not in OPTIONAL])
        shape = entries["image_shape"]
        shape = tuple(shape) if isinstance(shape, list) else shape
        noise_scale = check_noise_scale("noise_scale", entries.get("noise_scale", ()))
        statistics = entries.get("statistics")
        if statistics is not None:
            statistics = ImageStatistics.from_dict(statistics)
        return cls(
            **{
                **entries,
                "image_shape": shape,
                "noise_scale": noise_scale,
                "statistics": statistics,
                "points": _read_points(entries.get("points")),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build a card from JSON text; ValueError as for `from_dict`, or if it is no JSON."""
        return cls.from_dict(parse_json(text))

    def to_json(self) -> str:
        """Return the card as indented JSON text, a list of numbers on one line."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.statistics is not None:
            entries["statistics"] = self.statistics.to_dict()
        if self.points is not None:
            entries["points"] = {
                family or _OTHER: {str(calls): point._asdict() for calls, point in rows.items()}
                for family, rows in self.points.items()
            }
        text = json.dumps(entries, indent=2, ensure_ascii=False, allow_nan=False)
        # Texts hold no bare line breaks in JSON, so that only lists of numbers match.
        return re.sub(r"\[\n[-+.,\de\s]+\]", _on_one_line, text) + "\n"


def _read_points(entries: object) -> Points | None:
    """Return settings of point estimates from what JSON gives; ValueError if they are none."""
    if entries is None:
        return None
    try:
        return {
            None if family == _OTHER else family: {
                int(calls): Point(**values) for calls, values in rows.items()
            }
            for family, rows in dict(entries).items()  # type: ignore[call-overload]
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"points must be settings by family and number of calls: {error}"
        ) from None


def _check_points(points: Points) -> None:
    if not points.get(None):
        raise ValueError(f"points must hold settings for {_OTHER!r} families")
    for family, rows in points.items():
        for calls, point in rows.items():
            name = f"points[{family or _OTHER!r}][{calls}]"
            if not calls > 0:
                raise ValueError(f"{name} must be of at least 1 call")
            for field, value in point._asdict().items():
                _check_positive_number(f"{name}.{field}", value, or_zero=field == "last")
            if point.temperature > 1:
                raise ValueError(f"{name}.temperature must be at most 1, got {point.temperature}")


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text that is not empty, got {value!r}")


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {value!r}")


def _check_positive_number(name: str, value: object, *, or_zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer beyond all floats is above any of them.
    if not (is_number and 0 <= value <= MAX_FLOAT and (or_zero or value > 0)):  # type: ignore[operator]
        wanted = "a positive finite number" + (" or 0" if or_zero else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _check_image_shape(value: object) -> None:
    entries = value if isinstance(value, tuple) else ()
    counts = [n for n in entries if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if len(entries) != 3 or len(counts) != 3:
        raise ValueError(
            f"image_shape must be [C, H, W] with positive integers, or null, got {value!r}"
        )
