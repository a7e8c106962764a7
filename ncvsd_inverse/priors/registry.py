"""Trained priors by name or path: those of the package, of this machine, and of the hub."""

import hashlib
import threading
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import file_sha256
from ncvsd_inverse.machine import check_device, exact_arithmetic
from ncvsd_inverse.networks import inference_dtype
from ncvsd_inverse.networks.library import LibraryDenoiser
from ncvsd_inverse.priors.cache import StatisticsStore
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.convert import load_foreign
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.files import (
    HUB_PREFIX,
    SUFFIXES,
    WEIGHTS_SUFFIXES,
    WEIGHTS_VARIABLE,
    accepted_file,
    card_path,
    converted_stem,
    read_card,
    search_folders,
)
from ncvsd_inverse.priors.ncvsd import NCVSDPrior
from ncvsd_inverse.priors.published import (
    PUBLISHED,
    PublishedPrior,
    check_published_kind,
    fetch_published,
)
from ncvsd_inverse.priors.stored import TrainedNetwork, read_network
from ncvsd_inverse.protocols import Generators

__all__ = [
    "PriorHandle",
    "describe_prior",
    "list_priors",
    "load_card",
    "load_network",
    "load_prior",
    "locate",
]

SHIPPED = (
    "ncvsd_faces64",
    "ncvsd_faces64_teacher",
    "ncvsd_natural",
    "ncvsd_natural_teacher",
)
FOLDER_STEMS = ("prior", "model")
"""What a run and `HubPrior.save_pretrained` call the prior of a folder."""
RUN_FILES = ("state.safetensors", "log.jsonl")
"""Files by which the folder of a training run is known before it holds a prior."""


@exact_arithmetic()
def load_prior(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NCVSDPrior | DiffusionPrior:
    """Load a trained prior; its weights are checked against the SHA-256 of its card.

    Args:
        name_or_path: one of
            a name of `list_priors()`;
            the path of a weights file, of its card, or of both without their suffix;
            the folder of a training run, or one that `HubPrior.save_pretrained` wrote;
            a foreign checkpoint (see `ncvsd_inverse.priors.convert.load_foreign`), which has no
            card;
            "owner/name", a repository of the Hugging Face hub that holds a prior of ours, a
            `UNet2DModel` of diffusers, or one file of weights; "owner/name/FILE", one file of
            it. What is a path on this machine is never sought at the hub; "hf:owner/name",
            "hf:owner/name@revision" and "hf:owner/name@revision/FILE" always are.
        device: where the network runs; None: torch's default device, the CPU unless changed.
        dtype: precision in which the network computes; None: the fastest on `device` without
            visible loss (`networks.inference_dtype`); torch.float32 for exactness. Images come
            out in the dtype they came in, whatever it is.

    Returns:
        An `NCVSDPrior`, or a `DiffusionPrior` where the weights are a teacher's; a new object at
        each call.

    Raises:
        ValueError: if the name is unknown (the known ones are listed), or the device is not
            usable, as mps is.
        TypeError: if `name_or_path` is neither, or `dtype` is no floating-point dtype.
        CheckpointError: if a file is missing, damaged, or not what its card says.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    where = check_device("device", torch.get_default_device() if device is None else device)
    place = locate(name_or_path)
    if not card_path(place).exists():
        foreign = load_foreign(place, device, dtype)
        foreign.statistics_store = StatisticsStore(_weights_digest(place))
        foreign.statistics = foreign.statistics_store.read()
        return foreign
    card = read_card(place)
    dtype = dtype or inference_dtype(where)
    network = read_network(place, card, where, dtype).to_inference(dtype)
    store = _statistics_store(name_or_path, place, card)
    statistics = card.statistics if store is None else card.statistics or store.read()
    prior: NCVSDPrior | DiffusionPrior
    if card.gamma is None:
        prior = DiffusionPrior(
            network,
            image_shape=card.image_shape,
            sigma_min=card.sigma_min,
            sigma_max=card.sigma_max,
            card=card,
            statistics=statistics,
        )
    else:
        prior = NCVSDPrior(
            network,
            image_shape=card.image_shape,
            gamma=card.gamma,
            sigma_min=card.sigma_min,
            sigma_max=card.sigma_max,
            card=card,
            noise_scale=card.noise_scale,
            tempers=card.tempers,
            statistics=statistics,
        )
    prior.statistics_store = store
    return prior


def _statistics_store(
    name_or_path: str | Path, place: Path, card: PriorCard
) -> StatisticsStore | None:
    """Return where statistics of a prior go; None for one that comes with its own.

    A prior that ships with the package leaves the package alone, unless its path is given.
    """
    shipped = place.parent == search_folders()[0] and place.name == str(name_or_path)
    if not shipped:
        return StatisticsStore(card.sha256, card_path(place))
    return StatisticsStore(card.sha256) if card.statistics is None else None


def _weights_digest(place: Path) -> str:
    """Return what a foreign checkpoint is known by: a hash of its file, or of those in it."""
    if place.is_file():
        return file_sha256(place)
    files = sorted(path for path in place.rglob("*") if path.suffix in (*WEIGHTS_SUFFIXES, ".bin"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


@exact_arithmetic()
def load_network(name_or_path: str | Path) -> TrainedNetwork:
    """Load the network of a trained prior as it was trained, float32 on the CPU, to train on.

    Arguments and errors as for `load_prior`.
    """
    place = locate(name_or_path)
    network = read_network(place, read_card(place), torch.device("cpu"))
    if isinstance(network, LibraryDenoiser):
        raise CheckpointError(f"{place} holds a network of another library, which does not train")
    return network


def load_card(name_or_path: str | Path) -> PriorCard:
    """Read the card of a trained prior; arguments and errors as for `load_prior`.

    >>> load_card("ncvsd_faces64").image_shape
    (3, 64, 64)

    Its weights are not read, but fetched and converted where that is how the card comes to be;
    `describe_prior` never does.
    """
    return read_card(locate(name_or_path))


def describe_prior(name_or_path: str | Path) -> PriorCard | PublishedPrior:
    """Return what is known of a prior on this machine, without asking any other.

    Args:
        name_or_path: as for `load_prior`, but not of the hub.

    Returns:
        The card; of a published prior that is not here yet, its entry.

    Raises:
        ValueError: if the name is unknown; the known ones are listed.
        CheckpointError: if the card is missing or damaged.
    """
    place = _find(name_or_path)
    if place is not None:
        return read_card(place)
    if name_or_path in PUBLISHED:
        return PUBLISHED[str(name_or_path)]
    if _is_of_hub(name_or_path):
        raise CheckpointError(f"there is no {name_or_path} on this machine; load_prior fetches it")
    raise _explain_absence(name_or_path)


def list_priors() -> list[str]:
    """Return the names that `load_prior` knows, sorted.

    They are the priors that ship with the package, those in the folder $NCVSD_WEIGHTS and in the
    cache folder, and those that their authors publish, whether here yet or not.

    >>> "ncvsd_natural" in list_priors()
    True
    """
    cards = (card for folder in search_folders() for card in folder.glob("*.json"))
    found = {card.stem for card in cards if card.is_file()}
    return sorted(found | PUBLISHED.keys())


class PriorHandle:
    """A prior by name that is loaded when it is first used; importing one loads nothing.

    It has every attribute of the prior that it stands for, and draws on the device of what it is
    given. Copies and pickles are of the name: they carry no weights.

    Args:
        name: a name that `load_prior` knows by the time of the first use.
    """

    # As of the prior itself: `__getattr__` finds it.
    nfe_per_sample: int

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._priors: dict[torch.device, NCVSDPrior | DiffusionPrior] = {}
        self._device: torch.device | None = None

    def load(self, device: torch.device | str | None = None) -> NCVSDPrior | DiffusionPrior:
        """Return the prior on a device, always the same one, loading it at the first call.

        Args:
            device: where its network runs; None: where it was first loaded, else torch's default
                device.

        Raises:
            CheckpointError: as for `load_prior`.
        """
        with self._lock:
            where = device or self._device or torch.get_default_device()
            where = torch.empty(0, device=where).device  # "cuda" is "cuda:0"
            prior = self._priors.get(where)
            # One that was moved is no longer the prior on this device.
            if prior is None or prior.device not in (where, None):
                prior = self._priors[where] = load_prior(self.name, device=where)
            self._device = self._device or where
            return prior

    def to(self, device: torch.device | str) -> Self:
        """Load the prior on `device`, from where its attributes are taken then; return `self`."""
        self._device = self.load(device).device
        return self

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ p(x0 | u) where `u` is, as the prior's own `sample`; shape (B, C, H, W)."""
        where = u.device if isinstance(u, Tensor) else None
        return self.load(where).sample(u, sigma, generator=generator)

    def __getattr__(self, name: str) -> object:
        # Copying, pickling and notebooks probe for underscored names: they must not load a prior.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.load(), name)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.name,)

    def __repr__(self) -> str:
        return f"<prior {self.name!r}, {'loaded' if self._priors else 'not loaded'}>"


def locate(name_or_path: str | Path) -> Path:
    """Return the path of the prior that a name or path means, fetching it if need be.

    It is that of a card without its suffix if there is such a card, else a foreign checkpoint's.
    """
    place = _find(name_or_path)
    if place is not None:
        return place
    if name_or_path in PUBLISHED:
        return fetch_published(str(name_or_path))
    if isinstance(name_or_path, str) and ("/" in name_or_path or _is_of_hub(name_or_path)):
        # Loaded when a name may be one of the hub: huggingface_hub is slow to import.
        from ncvsd_inverse.priors import hub

        address = hub.Address.parse(name_or_path)
        if address is not None:
            try:
                return hub.fetch(address)
            except CheckpointError as error:
                if _is_of_hub(name_or_path):
                    raise
                raise CheckpointError(
                    f"there is no path {name_or_path} here, nor a prior at the hub: {error}"
                ) from error
    raise _explain_absence(name_or_path)


def _find(name_or_path: str | Path) -> Path | None:
    """Return the path, as `locate` does, of a prior that is on this machine."""
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"prior must be a name or a path, got {type(name_or_path).__name__}")
    if _is_of_hub(name_or_path):
        return None
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, Path) or path.name != name_or_path:
        return _find_path(path)
    for folder in search_folders():
        if card_path(folder / name_or_path).is_file():
            if name_or_path in PUBLISHED:
                check_published_kind(name_or_path, folder / name_or_path)
            return folder / name_or_path
    if name_or_path in PUBLISHED:
        accepted = accepted_file(name_or_path)
        if accepted is None:
            return None
        stem = converted_stem(accepted[0], name_or_path)
        if not card_path(stem).is_file():
            return None
        check_published_kind(name_or_path, stem)
        return stem
    return None if name_or_path in SHIPPED else _find_path(path)


def _is_of_hub(name_or_path: str | Path) -> bool:
    return isinstance(name_or_path, str) and name_or_path.startswith(HUB_PREFIX)


def _find_path(path: Path) -> Path | None:
    """Return the path, as `locate` does, of the prior that a path means, None without one."""
    if path.suffix in (".safetensors", ".json") and card_path(path.with_suffix("")).exists():
        return path.with_suffix("")
    if card_path(path).exists():
        return path
    if not path.is_dir():
        return path if path.exists() else None
    for stem in FOLDER_STEMS:
        if card_path(path / stem).exists():
            return path / stem
    if any((path / file).is_file() for file in RUN_FILES):
        raise CheckpointError(
            f"the run in {path} has not written a prior yet; its command with --seconds 0 does"
        )
    return path


def _explain_absence(name_or_path: str | Path) -> Exception:
    """Return the error for a prior that is not here and cannot be fetched."""
    if name_or_path in SHIPPED:
        name = str(name_or_path)
        return CheckpointError(
            f"{name} needs {name}.safetensors and {name}.json, which are in none of "
            f"{', '.join(str(folder) for folder in search_folders())} "
            f"(${WEIGHTS_VARIABLE} may name another folder); they do not ship with this version "
            "of the package"
        )
    path = Path(name_or_path).expanduser()
    is_name = isinstance(name_or_path, str) and path.name == name_or_path
    if is_name and path.suffix not in SUFFIXES:
        try:
            check_choice("prior", str(name_or_path), list_priors())
        except ValueError as error:
            return error
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return CheckpointError(
        f"there is no {path}, and no {card_path(stem)}: a prior needs its weights and its card"
    )
