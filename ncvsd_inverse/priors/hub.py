"""Priors from and to Hugging Face: weights and card as files, published checkpoints converted.

No code from a file runs: a repository's two files are safetensors and JSON, checked as all priors
are, and a pickle goes through `ncvsd_inverse.priors.convert`. It must not know any network.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeAlias

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download, hf_hub_url

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.priors import zoo

STEM = "model"
"""Name of the weights and the card in a repository, without suffix."""

Converter: TypeAlias = Callable[[Path, Path], object]
"""Writes a foreign checkpoint (its path) as a prior (the path of both files without suffix)."""


class HubPrior(zoo.PriorHandle, ModelHubMixin):
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

    @property
    def nfe_per_sample(self) -> int:  # type: ignore[override]
        """Network calls for each draw; asking loads the prior."""
        return self.load().nfe_per_sample

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
            return cls(folder / STEM)
        stem = fetch_repository(
            str(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return cls(stem)

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return the card of the prior as the README.md of a repository."""
        card = zoo.load_card(self.name)
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
        stem = zoo._locate(self.name)
        card = zoo._read_card(stem)
        zoo._read_network(stem, card)
        target = save_directory / STEM
        zoo._write_whole(
            [
                (zoo._weights_path(target), zoo._read(zoo._weights_path(stem))),
                (zoo._card_path(target), card.to_json().encode()),
                (save_directory / "README.md", str(self.generate_model_card()).encode()),
            ]
        )


def is_repository(name: str) -> bool:
    """Whether `name` reads as "owner/name" or "owner/name@revision", and not as a path.

    It is a path if the folder before its last part exists.
    """
    if Path(name).parent.is_dir():
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name) is not None


def fetch_repository(
    repository: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Download the prior of a repository, unless it is kept; return its path without suffix.

    Args:
        repository: "owner/name" or "owner/name@revision".
        revision: branch, tag or commit; None: the one after "@", else main.
        token: as for `HubPrior.from_pretrained`.
        cache_dir: likewise.
        force_download: likewise.
        local_files_only: likewise.

    Raises:
        CheckpointError: if a file cannot be had; it says what to fetch.
    """
    repository, _, named = repository.partition("@")

    def fetch(file: str, revision: str | None) -> Path:
        try:
            return Path(
                hf_hub_download(
                    repository,
                    file,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            )
        except Exception as error:  # network libraries raise what they like
            urls = " and ".join(
                hf_hub_url(repository, f"{STEM}.{suffix}", revision=revision)
                for suffix in ("safetensors", "json")
            )
            raise CheckpointError(
                f"{file} of {repository} cannot be had: {_first_line(error)}; where there is a "
                f"network, fetch {urls} into one folder and load FOLDER/{STEM} from there"
            ) from error

    card = fetch(f"{STEM}.json", revision or named or None)
    # Kept in a folder named by the commit: the weights must be of the same one.
    weights = fetch(f"{STEM}.safetensors", card.parent.name)
    return weights.with_suffix("")


def fetch_published(name: str, convert: Converter | None = None) -> Path:
    """Return the path, without suffix, of a prior that its authors publish as a pickle.

    The first time the pickle is looked for in the folders of priors, then downloaded, and
    converted once for its content; later nothing but the result is needed.

    Args:
        name: a key of `zoo.PUBLISHED`.
        convert: what converts it; None: `ncvsd_inverse.priors.convert.convert`.

    Raises:
        CheckpointError: if the file cannot be had or converted; it says what to fetch.
    """
    repository, file = zoo.PUBLISHED[name]
    mark = _cache() / f"{name}.sha256"
    if mark.is_file():
        stem = _converted(mark.read_text().strip(), name)
        if zoo._card_path(stem).is_file():
            return stem
    kept = (folder / file for folder in zoo._folders())
    source = next((path for path in kept if path.is_file()), None)
    stem = convert_once(source or _download(name, repository, file), name, convert)
    zoo._write_whole([(mark, stem.parent.name.encode())])
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
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # Hugging Face keeps large files under their own SHA-256.
    expected = source.resolve().name
    if re.fullmatch("[0-9a-f]{64}", expected) and digest != expected:
        raise CheckpointError(f"{source} is damaged: its SHA-256 is {digest}; delete it to retry")
    stem = _converted(digest, name)
    if not zoo._card_path(stem).is_file():
        if convert is None:
            from ncvsd_inverse.priors import convert as own

            convert = own.convert
        stem.parent.mkdir(parents=True, exist_ok=True)
        convert(source, stem)
        zoo._read_card(stem)
    return stem


def _cache() -> Path:
    return zoo._folders()[-1]


def _converted(digest: str, name: str) -> Path:
    return _cache() / "converted" / digest / name


def _download(name: str, repository: str, file: str) -> Path:
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # network libraries raise what they like
        raise CheckpointError(
            f"{name} is not here and cannot be downloaded: {_first_line(error)}; where there is a "
            f"network, fetch {hf_hub_url(repository, file)} and put it, as it is, into one of "
            f"{', '.join(str(folder) for folder in zoo._folders())} "
            f"(${zoo.WEIGHTS_VARIABLE} may name another folder); it is a pickle, which is never "
            "unpickled but converted, once, when the prior is next used"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
