"""What Hugging Face keeps: names of repositories, and their files fetched."""

import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
)

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.priors.files import HUB_PREFIX, SUFFIXES, WEIGHTS_SUFFIXES

__all__ = ["PATIENCE", "STEM", "Address", "Repository", "T", "fetch"]

T = TypeVar("T")

STEM = "model"
"""Name of the weights and the card in a repository, without suffix."""

PATIENCE = 5.0
"""Seconds in which the hub must answer, unless $HF_HUB_ETAG_TIMEOUT says how many."""

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
"""Name of the weights in a repository of diffusers, without suffix."""
DIFFUSERS_SUFFIXES = (".safetensors", ".bin")
"""Suffixes of these, the one to prefer first."""


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
        if match is None or (file and not file.endswith(WEIGHTS_SUFFIXES)):
            raise CheckpointError(
                "a name of the hub must be owner/name[@revision][/FILE], with a FILE that ends in "
                f"one of {', '.join(WEIGHTS_SUFFIXES)}, got {name!r}"
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
        if name.startswith(HUB_PREFIX):
            return cls.of_hub(name.removeprefix(HUB_PREFIX))
        if Path(name.partition("/")[0]).is_dir():
            return None
        try:
            address = cls.of_hub(name)
        except CheckpointError:
            return None
        like_a_file = name == address.repository and name.endswith(SUFFIXES)
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
    found = sorted(name for name in repository.files if name.endswith(WEIGHTS_SUFFIXES))
    if len(found) != 1:
        raise CheckpointError(
            f"{repository} must hold {STEM}.safetensors with {STEM}.json, a UNet2DModel of "
            f"diffusers, or one file that ends in {', '.join(WEIGHTS_SUFFIXES)}; got "
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
