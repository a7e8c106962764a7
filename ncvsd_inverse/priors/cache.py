"""Where statistics that were measured for a prior are kept: its card, or a file of the cache."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ncvsd_inverse.files import cache_folder, write_whole
from ncvsd_inverse.plain_data import read_json
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.statistics import ImageStatistics

__all__ = [
    "StatisticsStore",
]


@dataclass(frozen=True)
class StatisticsStore:
    """The place of one prior's statistics.

    Attributes:
        sha256: of its weights.
        card: path of the card that takes them; None: a file of the cache does.
    """

    sha256: str
    card: Path | None = None

    def read(self) -> ImageStatistics | None:
        """Return what the cache holds; None if nothing that can be used."""
        try:
            return ImageStatistics.from_dict(read_json(self._cached))
        except (OSError, ValueError):
            return None

    def write(self, statistics: ImageStatistics) -> Path:
        """Keep statistics, whole or not at all; return the path of the file that holds them.

        Raises:
            OSError: if no file can be written.
        """
        if self.card is not None:
            card = PriorCard.from_dict(read_json(self.card))
            text = replace(card, statistics=statistics).to_json()
            if card.sha256 == self.sha256:
                try:
                    write_whole(self.card, text)
                    return self.card
                except OSError:
                    pass  # a folder that cannot be written, such as an installed package's
        self._cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._cached, json.dumps(statistics.to_dict()) + "\n")
        return self._cached

    @property
    def _cached(self) -> Path:
        return cache_folder() / "statistics" / f"{self.sha256}.json"
