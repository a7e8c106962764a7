"""Trained priors by name or path: a safetensors file of weights beside a JSON card, checked."""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ncvsd_inverse.checks import check_choice, check_image_size
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import cache_folder, file_sha256, whole_files
from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ControlledDenoiser,
    Denoiser,
    inference_dtype,
    network_config,
)
from ncvsd_inverse.networks.edm2_layers import MPConv
from ncvsd_inverse.priors.cache import StatisticsStore
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.convert import LibraryDenoiser, build_converted, load_foreign
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.files import TensorFile, write_tensors
from ncvsd_inverse.priors.ncvsd import NCVSDPrior
from ncvsd_inverse.priors.published import PUBLISHED, PublishedPrior
from ncvsd_inverse.protocols import Generators

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_VARIABLE = "NCVSD_WEIGHTS"

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
HUB_PREFIX = "hf:"
"""With what a name begins that is one of the hub, whatever paths there are."""
WEIGHTS_SUFFIXES = (".pkl", ".pt", ".pth", ".safetensors")
"""What files of weights end in."""
SUFFIXES = (*WEIGHTS_SUFFIXES, ".json")
"""What paths of priors end in; a name that ends so is a path."""

TrainedNetwork: TypeAlias = ConcatDenoiser | ControlledDenoiser | Denoiser
NETWORKS: dict[str, tuple[type[TrainedNetwork | LibraryDenoiser], ...]] = {
    "ncvsd": (ConcatDenoiser, ControlledDenoiser),
    "diffusion": (Denoiser, LibraryDenoiser),
}
"""The networks that each kind of prior can have."""


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
        ValueError: if the name is unknown; the known ones are listed.
        TypeError: if `name_or_path` is neither, or `dtype` is no floating-point dtype.
        CheckpointError: if a file is missing, damaged, or not what its card says.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    place = locate(name_or_path)
    if not card_path(place).exists():
        foreign = load_foreign(place, device, dtype)
        foreign.statistics_store = StatisticsStore(_weights_digest(place))
        foreign.statistics = foreign.statistics_store.read()
        return foreign
    card = read_card(place)
    where = torch.get_default_device() if device is None else torch.device(device)
    dtype = dtype or inference_dtype(where)
    network = _read_network(place, card, where, dtype).to_inference(dtype)
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
    shipped = place.parent == PACKAGE_WEIGHTS and place.name == str(name_or_path)
    if not shipped:
        return StatisticsStore(card.sha256, card_path(place))
    return StatisticsStore(card.sha256) if card.statistics is None else None


def _weights_digest(place: Path) -> str:
    """Return what a foreign checkpoint is known by: a hash of its file, or of those in it."""
    if place.is_file():
        return file_sha256(place)
    files = sorted(path for path in place.rglob("*") if path.suffix in (*WEIGHTS_SUFFIXES, ".bin"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def load_network(name_or_path: str | Path) -> TrainedNetwork:
    """Load the network of a trained prior as it was trained, float32 on the CPU, to train on.

    Arguments and errors as for `load_prior`.
    """
    place = locate(name_or_path)
    network = _read_network(place, read_card(place), torch.device("cpu"))
    if isinstance(network, LibraryDenoiser):
        raise CheckpointError(f"{place} holds a network of another library, which does not train")
    return network


def load_card(name_or_path: str | Path) -> PriorCard:
    """Read the card of a trained prior; arguments and errors as for `load_prior`.

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
    """
    found = {card.stem for folder in search_folders() for card in folder.glob("*.json")}
    return sorted(found | PUBLISHED.keys())


def save_prior(
    path_without_suffix: str | Path, network: TrainedNetwork, card: Mapping[str, object]
) -> PriorCard:
    """Write the weights of a prior to NAME.safetensors and its card to NAME.json.

    Nothing is written unless both are valid, and each file appears whole, weights first: after a
    crash between the two, loading reports that they do not belong together.

    Args:
        path_without_suffix: FOLDER/NAME; the folder must exist.
        network: as trained, not changed by `to_inference`.
        card: the fields of `PriorCard`; `network` and `sha256` are filled in.

    Returns:
        The card as written.

    Raises:
        ValueError: if the card is not valid, or the network is not as trained or not finite.
        TypeError: if `network` is of no kind that a prior can have.
    """
    if not isinstance(network, TrainedNetwork):
        raise TypeError(f"network must be one of {TrainedNetwork}, got {type(network).__name__}")
    filled = {**card, "network": network_config(network), "sha256": "0" * 64}
    full = PriorCard.from_json(PriorCard.from_dict(filled).to_json())
    _build(full)
    if any(layer.is_folded for layer in network.modules() if isinstance(layer, MPConv)):
        raise ValueError("network must be as trained, not changed by to_inference")
    state = network.state_dict()
    _check_weights({"not finite": {name for name in state if not _is_finite(state[name])}})
    stem = Path(path_without_suffix)
    with whole_files(weights_path(stem), card_path(stem)) as (weights, text):
        full = replace(full, sha256=write_tensors(weights, state))
        text.write_bytes(full.to_json().encode())
    return full


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


def search_folders() -> list[Path]:
    """Return where priors are looked for by name, first come first served."""
    own = os.environ.get(WEIGHTS_VARIABLE)
    return [PACKAGE_WEIGHTS, *([Path(own)] if own else []), cache_folder()]


def weights_path(stem: Path) -> Path:
    """Return the path of the weights of a prior whose path without suffix is `stem`."""
    return stem.with_name(stem.name + ".safetensors")


def card_path(stem: Path) -> Path:
    """Return the path of the card of a prior whose path without suffix is `stem`."""
    return stem.with_name(stem.name + ".json")


def converted_stem(sha256: str, name: str) -> Path:
    """Return where a published file of this SHA-256 is kept once converted, without suffix."""
    return cache_folder() / "converted" / sha256 / name


def record_path(name: str) -> Path:
    """Return where it is recorded which published file was accepted under a name."""
    return cache_folder() / f"{name}.sha256"


def accepted_file(name: str) -> tuple[str, str | None] | None:
    """Return SHA-256 and revision (if known) of the published file first used under a name."""
    try:
        digest, *revision = record_path(name).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return digest, next(iter(revision), None)


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


def locate(name_or_path: str | Path) -> Path:
    """Return the path of the prior that a name or path means, fetching it if need be.

    It is that of a card without its suffix if there is such a card, else a foreign checkpoint's.
    """
    place = _find(name_or_path)
    if place is not None:
        return place
    if name_or_path in PUBLISHED:
        from ncvsd_inverse.priors import hub

        return hub.fetch_published(str(name_or_path))
    if isinstance(name_or_path, str) and ("/" in name_or_path or _is_of_hub(name_or_path)):
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


def read_card(stem: Path) -> PriorCard:
    """Read the card of a prior whose path without suffix is `stem`; CheckpointError if unfit."""
    path = card_path(stem)
    try:
        return PriorCard.from_json(path.read_bytes().decode())
    except FileNotFoundError:
        raise CheckpointError(
            f"a prior needs its weights and its card, but there is no {path}; "
            "`ncvsd convert` makes both of a foreign checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} must be readable: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} must be the card of a prior: {error}") from error


def _read_network(
    stem: Path, card: PriorCard, device: torch.device, dtype: torch.dtype | None = None
) -> TrainedNetwork | LibraryDenoiser:
    """Build the network of a card and fill it with the weights beside it, all checked.

    It is first built without memory, so that a card cannot ask for more than its weights hold, and
    filled one tensor at a time: with a `dtype`, layers are at once stored ready for passes in it.
    """
    with _weights(stem, card) as (network, file):
        bad = set()
        stored = network.state_dict().keys()
        for prefix, module in network.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, empty in own:
                full = f"{prefix}.{name}".removeprefix(".")
                if full not in stored:
                    continue
                value = file.read(full)
                if not _is_finite(value):
                    bad.add(full)
                # The layout of the memory is the network's, channels last for some.
                value = torch.empty_like(empty, device=device).copy_(value)
                is_parameter = isinstance(empty, nn.Parameter)
                setattr(module, name, nn.Parameter(value) if is_parameter else value)
            if dtype is not None and isinstance(module, MPConv):
                module.fold_(dtype)
        _check_weights({"not finite": bad})
    return network


def check_files(stem: Path, card: PriorCard) -> None:
    """CheckpointError unless the weights at `stem` are those of the card."""
    with _weights(stem, card) as (_, file):
        _check_weights(
            {"not finite": {name for name in file.shapes if not _is_finite(file.read(name))}}
        )


@contextmanager
def _weights(
    stem: Path, card: PriorCard
) -> Iterator[tuple[TrainedNetwork | LibraryDenoiser, TensorFile]]:
    """Open the weights of a card; yield its network, without memory, and the file that fits it.

    Within the context, too, what is wrong with the file becomes a CheckpointError that names it.
    """
    path = weights_path(stem)
    try:
        digest = file_sha256(path)
        if digest != card.sha256:
            raise CheckpointError(
                f"{path} must have the SHA-256 of its card, {card.sha256}, got {digest}: "
                "it is damaged or belongs to another card"
            )
        network = _build(card)
        with TensorFile(path) as file:
            expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
            came, both = file.shapes, expected.keys() & file.shapes.keys()
            _check_weights(
                {
                    "missing": expected.keys() - came.keys(),
                    "unexpected": came.keys() - expected.keys(),
                    "of another shape": {name for name in both if expected[name] != came[name]},
                }
            )
            yield network, file
    except FileNotFoundError:
        raise CheckpointError(
            f"a prior needs its weights and its card, but there is no {path}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} must be readable: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} must hold the network of its card: {error}") from error


def _build(card: PriorCard) -> TrainedNetwork | LibraryDenoiser:
    """Build the network that `card` describes, without memory; ValueError if the card is wrong."""
    network = build_converted(card.network, "meta")
    if not isinstance(network, NETWORKS[card.kind]):
        raise ValueError(f"kind {card.kind!r} cannot have a {type(network).__name__}")
    side = network.resolution
    if side is not None and card.image_shape != (network.image_channels, side, side):
        raise ValueError(
            f"image_shape must be {(network.image_channels, side, side)}, got {card.image_shape}"
        )
    if card.image_shape is not None:
        check_image_size(
            "image_shape",
            card.image_shape,
            channels=network.image_channels,
            multiple=network.size_multiple,
        )
    return network


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _check_weights(faults: Mapping[str, Set[str]]) -> None:
    """ValueError that names the tensors at fault unless there are none."""
    told = [f"{fault}: {_listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError("weights " + "; ".join(told))


def _listed(names: Set[str], most: int = 8) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + rest
