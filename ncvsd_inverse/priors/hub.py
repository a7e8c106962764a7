"""Priors from and to Hugging Face: weights and card as files, published checkpoints converted.

No code from a file runs: a repository's two files are safetensors and JSON, checked as all priors
are, and a pickle goes through `ncvsd_inverse.priors.convert`.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, TypeVar

from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    ModelHubMixin,
    constants,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
)

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import file_sha256, whole_files
from ncvsd_inverse.priors import registry
from ncvsd_inverse.priors.published import PUBLISHED, PublishedPrior

T = TypeVar("T")

STEM = "model"
"""Name of the weights and the card in a repository, without suffix."""

PATIENCE = 5.0
"""Seconds in which the hub must answer, unless $HF_HUB_ETAG_TIMEOUT says how many."""

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
"""Name of the weights in a repository of diffusers, without suffix."""
DIFFUSERS_SUFFIXES = (".safetensors", ".bin")
"""Suffixes of these, the one to prefer first."""

Converter: TypeAlias = Callable[[Path, Path], object]
"""Writes a foreign checkpoint (its path) as a prior (the path of both files without suffix)."""


class HubPrior(registry.PriorHandle, ModelHubMixin):
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
            own = registry.card_path(folder / STEM).exists()
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
        card = registry.load_card(self.name)
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
        stem = registry.locate(self.name)
        card = registry.read_card(stem)
        registry.check_files(stem, card)
        target = save_directory / STEM
        paths = (
            registry.weights_path(target),
            registry.card_path(target),
            save_directory / "README.md",
        )
        with whole_files(*paths) as (weights, text, readme):
            shutil.copyfile(registry.weights_path(stem), weights)
            text.write_bytes(card.to_json().encode())
            readme.write_bytes(str(self.generate_model_card()).encode())


@dataclass(frozen=True)
class Address:
    """What a name means at the hub.

    Attributes:
        repository: "owner/name".
        revision: branch, tag or commit; None: main.
        file: one file of it, or None.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def of_hub(cls, name: str) -> Self:
        """Read "owner/name", "owner/name@revision", "owner/name/FILE" or "...@revision/FILE".

        Raises:
            CheckpointError: if `name` is not of these forms.
        """
        # A revision is one part, or those of a reference such as refs/pr/1.
        match = re.fullmatch(
            r"(\w[\w.-]*/\w[\w.-]*)(?:@(refs/[\w.-]+/[\w.-]+|\w[\w.-]*))?((?:/\w[\w.-]*)*)", name
        )
        file = match[3][1:] if match else ""
        if match is None or (file and not file.endswith(registry.WEIGHTS_SUFFIXES)):
            raise CheckpointError(
                "a name of the hub must be owner/name[@revision][/FILE], with a FILE that ends in "
                f"one of {', '.join(registry.WEIGHTS_SUFFIXES)}, got {name!r}"
            )
        return cls(match[1], match[2], file or None)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Read a name that may as well be a path: after "hf:" it never is.

        Returns:
            The address, or None for a path: the folder that it begins with exists, or it is not of
            the forms of `of_hub`, or it would be a repository that is called like a file.

        Raises:
            CheckpointError: if a name after "hf:" is not of these forms.
        """
        if name.startswith(registry.HUB_PREFIX):
            return cls.of_hub(name.removeprefix(registry.HUB_PREFIX))
        if Path(name.partition("/")[0]).is_dir():
            return None
        try:
            address = cls.of_hub(name)
        except CheckpointError:
            return None
        like_a_file = name == address.repository and name.endswith(registry.SUFFIXES)
        return None if like_a_file else address


class Repository:
    """The files of a repository at one commit, from the hub or, without it, from what is kept.

    The hub is asked once for what there is; so an answer comes in a few seconds whatever happens.

    Args:
        repository: "owner/name".
        revision: branch, tag or commit; None: main.
        token: as for `HubPrior.from_pretrained`.
        cache_dir: likewise.
        force_download: likewise.
        local_files_only: likewise.

    Attributes:
        files: names of its files, with folders; where it is not at hand, those that are kept.

    Raises:
        CheckpointError: if it is neither at hand nor kept.
    """

    def __init__(
        self,
        repository: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> None:
        self.name = repository
        self.revision = revision
        self._token = token
        self._cache_dir = cache_dir
        self._force = force_download
        self._local = local_files_only
        self._commit: str | None = None
        reason = "no server may be asked"
        if not (local_files_only or constants.HF_HUB_OFFLINE):
            try:
                self.files = self._ask()
                return
            except Exception as error:  # network libraries raise what they like
                reason = _first_line(error)
        kept = self._kept()
        if kept is None:
            raise CheckpointError(f"{self} cannot be had: {reason}")
        self._local = True
        self._commit, self.files = kept

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def get(self, file: str) -> Path:
        """Return where a file is, downloaded unless it is kept.

        Raises:
            CheckpointError: if it cannot be had.
        """
        try:
            path = hf_hub_download(
                self.name,
                file,
                revision=self._commit or self.revision,
                token=self._token,
                cache_dir=self._cache_dir,
                force_download=self._force and not self._local,
                local_files_only=self._local,
            )
        except Exception as error:  # network libraries raise what they like
            raise CheckpointError(
                f"{file} of {self}, {self.url(file)}, cannot be had: {_first_line(error)}"
            ) from error
        # Kept in a folder named by the commit, of which all files must be.
        self._commit = Path(path).parents[file.count("/")].name
        return Path(path)

    def url(self, file: str) -> str:
        """Return where a file can be fetched by hand."""
        return hf_hub_url(self.name, file, revision=self.revision)

    def _ask(self) -> set[str]:
        seconds = PATIENCE
        if "HF_HUB_ETAG_TIMEOUT" in os.environ:
            seconds = constants.HF_HUB_ETAG_TIMEOUT
        info = _within(
            seconds,
            lambda: HfApi().model_info(
                self.name, revision=self.revision, timeout=seconds, token=self._token
            ),
        )
        return {entry.rfilename for entry in info.siblings or ()}

    def _kept(self) -> tuple[str, set[str]] | None:
        """Return the commit and the files that are kept of it."""
        folder = Path(self._cache_dir or constants.HF_HUB_CACHE)
        if not folder.is_dir():
            return None
        wanted = self.revision or constants.DEFAULT_REVISION
        for repository in scan_cache_dir(folder).repos:
            if repository.repo_id != self.name or repository.repo_type != "model":
                continue
            for revision in repository.revisions:
                if wanted == revision.commit_hash or wanted in revision.refs:
                    top = revision.snapshot_path
                    return revision.commit_hash, {
                        file.file_path.relative_to(top).as_posix() for file in revision.files
                    }
        return None


def fetch(
    address: Address,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Download a prior from the hub, unless it is kept.

    A repository holds a prior of ours (model.safetensors and model.json), a network of diffusers,
    or one file of weights. Of the second only the files needed are fetched: configurations and
    weights, these as safetensors where there are such; none that holds code.

    Args:
        address: repository, revision and file.
        revision: branch, tag or commit, instead of the address's.
        token: as for `HubPrior.from_pretrained`.
        cache_dir: likewise.
        force_download: likewise.
        local_files_only: likewise.

    Returns:
        The path of our prior, without suffix, or of what `load_foreign` takes.

    Raises:
        CheckpointError: if a file cannot be had; it says what to fetch.
    """
    revision = revision or address.revision
    try:
        repository = Repository(
            address.repository,
            revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    except CheckpointError as error:
        files = [address.file] if address.file else [f"{STEM}.safetensors", f"{STEM}.json"]
        urls = " and ".join(
            hf_hub_url(address.repository, file, revision=revision) for file in files
        )
        raise CheckpointError(
            f"{error}; where there is a network, fetch {urls}"
            + ("" if address.file else " of a prior of ours, or the folders of one of diffusers,")
            + " into a FOLDER and load that"
        ) from error
    if address.file is not None:
        return _fetch_file(repository, address.file)
    if f"{STEM}.json" in repository.files:
        return _fetch_file(repository, f"{STEM}.safetensors")
    named = {name.rpartition("/")[2] for name in repository.files}
    if named & {"model_index.json", *(DIFFUSERS_WEIGHTS + end for end in DIFFUSERS_SUFFIXES)}:
        return _fetch_diffusers(repository)
    found = sorted(name for name in repository.files if name.endswith(registry.WEIGHTS_SUFFIXES))
    if len(found) != 1:
        raise CheckpointError(
            f"{repository} must hold {STEM}.safetensors with {STEM}.json, a UNet2DModel of "
            f"diffusers, or one file that ends in {', '.join(registry.WEIGHTS_SUFFIXES)}; got "
            + (f"{', '.join(found[:10])}: name one as {repository}/FILE" if found else "none")
        )
    return _fetch_file(repository, found[0])


def _fetch_file(repository: Repository, file: str) -> Path:
    """Fetch one file of weights, with the card of a prior of ours if there is one beside it."""
    stem, _, suffix = file.rpartition(".")
    if suffix != "safetensors" or f"{stem}.json" not in repository.files:
        return repository.get(file)
    repository.get(f"{stem}.json")
    return repository.get(file).with_suffix("")


def _fetch_diffusers(repository: Repository) -> Path:
    """Fetch a `UNet2DModel` and its scheduler, those of a pipeline or its own; return the folder.

    The configurations come first, as they tell whether the weights are worth fetching.
    """
    folder = "unet/" if "unet/config.json" in repository.files else ""
    config = repository.get(f"{folder}config.json")
    try:
        entries = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}config.json of {repository} must be JSON: {error}"
        ) from None
    kind = entries.get("_class_name") if isinstance(entries, dict) else None
    if kind != "UNet2DModel":
        raise CheckpointError(f"{repository} must hold a UNet2DModel of diffusers, got {kind!r}")
    weights = [f"{folder}{DIFFUSERS_WEIGHTS}{end}" for end in DIFFUSERS_SUFFIXES]
    weights = [name for name in weights if name in repository.files]
    if not weights:
        raise CheckpointError(
            f"{repository} must hold its weights in one file, "
            f"{folder}{DIFFUSERS_WEIGHTS}{' or '.join(DIFFUSERS_SUFFIXES)}"
        )
    others = ("model_index.json", "scheduler_config.json", "scheduler/scheduler_config.json")
    for name in others:
        if name in repository.files:
            repository.get(name)
    repository.get(weights[0])
    return config.parents[folder.count("/")]


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
    entry = PUBLISHED[name]
    record, accepted = registry.record_path(name), registry.accepted_file(name)
    digest, revision = accepted or (None, None)
    source = registry.kept_file(entry)
    if source is None and digest is not None:
        stem = registry.converted_stem(digest, name)
        if registry.card_path(stem).is_file():
            registry.check_published_kind(name, stem)
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
        registry.check_published_kind(name, stem, source)
    except CheckpointError:
        for path in (registry.card_path(stem), registry.weights_path(stem)):
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
    return _converted(source, _checked_sha256(source), name, convert)


def _converted(source: Path, sha256: str, name: str, convert: Converter | None) -> Path:
    stem = registry.converted_stem(sha256, name)
    if not registry.card_path(stem).is_file():
        if convert is None:
            from ncvsd_inverse.priors import convert as own

            convert = own.convert
        stem.parent.mkdir(parents=True, exist_ok=True)
        convert(source, stem)
        registry.read_card(stem)
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
    try:
        return Repository(entry.repository, revision).get(entry.file)
    except CheckpointError as error:
        url = hf_hub_url(entry.repository, entry.file, revision=revision)
        raise CheckpointError(
            f"{entry.name} is not here and cannot be downloaded: {error}; where there is a "
            f"network, fetch {url} and put it, as it is, into one of "
            f"{', '.join(str(folder) for folder in registry.search_folders())} "
            f"(${registry.WEIGHTS_VARIABLE} may name another folder); it is a pickle, which is "
            "never unpickled but converted, once, when the prior is next used"
        ) from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns; TimeoutError after `seconds`.

    The client's own limit is for each address of a server, and knows nothing of looking up names.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # network libraries raise what they like
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s, which $HF_HUB_ETAG_TIMEOUT can change")
    return results[0]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
