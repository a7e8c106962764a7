"""A prior that comes from, or goes to, Hugging Face.

No code from a file runs: a repository's files are safetensors and JSON, checked as all priors are.
"""

import json
import shutil
from pathlib import Path
from typing import Self

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin

from ncvsd_inverse.files import whole_files
from ncvsd_inverse.priors.files import card_path, read_card, weights_path
from ncvsd_inverse.priors.hub import STEM, Address, fetch
from ncvsd_inverse.priors.registry import PriorHandle, load_card, locate
from ncvsd_inverse.priors.stored import check_files

__all__ = ["HubPrior"]


class HubPrior(PriorHandle, ModelHubMixin):
    """A trained prior that comes from, or goes to, a repository at Hugging Face.

    `save_pretrained(folder)` writes model.safetensors, model.json (the card) and README.md (the
    card for readers), `push_to_hub("owner/name")` uploads the three, and `from_pretrained` takes
    such a folder or repository. Everywhere else it is the prior: it loads when it is first used.

    Args:
        name_or_path: a prior that `load_prior` accepts.
    """

    def __init__(self, name_or_path: str | Path) -> None:
        super().__init__(str(name_or_path))
        self._hub_mixin_config = None  # the mixin would publish the path

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Return the prior of a folder that `save_pretrained` wrote, or of a repository.

        Args:
            pretrained_model_name_or_path: the folder, or "owner/name".
            revision: branch, tag or commit of the repository; None: main.
            token: for private repositories; None: the one that is logged in.
            cache_dir: where downloads are kept; None: Hugging Face's own folder.
            force_download: download although it is kept.
            local_files_only: ask no server.

        Raises:
            CheckpointError: if the files cannot be had; it says where they can be fetched.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            own = card_path(folder / STEM).exists()
            return cls(folder / STEM if own else folder.absolute())
        place = fetch(
            Address.of_hub(str(pretrained_model_name_or_path)),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return cls(place)

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return the card of the prior as the README.md of a repository."""
        card = load_card(self.name)
        data = ModelCardData(
            license="other",
            license_name="see-below",
            library_name="ncvsd-inverse",
            pipeline_tag="image-to-image",
            tags=["inverse-problems", "image-restoration", f"{card.kind}-prior"],
        )
        size = "any" if card.image_shape is None else " x ".join(map(str, card.image_shape))
        lines = [
            f"---\n{data.to_yaml()}\n---",
            f"# {card.name}",
            card.intended_use,
            "```python\nfrom ncvsd_inverse import load_prior\n\n"
            'prior = load_prior("OWNER/NAME")  # of this repository\n```',
            f"- Kind: {card.kind}\n- Images (C x H x W): {size}\n"
            f"- Noise std: {card.sigma_min:g} to {card.sigma_max:g}, for images in [-1, 1]\n"
            f"- SHA-256 of {STEM}.safetensors: `{card.sha256}`",
            f"## Data\n\n{card.data}",
            f"## Licence\n\n{card.licence}",
            f"## Weaknesses\n\n{card.weaknesses}",
        ]
        for title, entries in (("Evaluation", card.evaluation), ("Training", card.training)):
            text = json.dumps(entries, indent=2, ensure_ascii=False)
            lines.append(f"## {title}\n\n```json\n{text}\n```")
        return ModelCard("\n\n".join(lines) + "\n")

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights, card and README.md, each whole, once the prior is known to be sound."""
        stem = locate(self.name)
        card = read_card(stem)
        check_files(stem, card)
        target = save_directory / STEM
        paths = (
            weights_path(target),
            card_path(target),
            save_directory / "README.md",
        )
        with whole_files(*paths) as (weights, text, readme):
            shutil.copyfile(weights_path(stem), weights)
            text.write_bytes(card.to_json().encode())
            readme.write_bytes(str(self.generate_model_card()).encode())
