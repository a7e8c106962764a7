"""Trained priors by name or path: a safetensors file of weights beside a JSON card, checked.

It must not know how priors are trained, and it never unpickles.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_image_size
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ControlledDenoiser,
    Denoiser,
    inference_dtype,
    network_config,
)
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.convert import LibraryDenoiser, build_converted, load_foreign
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import NCVSDPrior
from ncvsd_inverse.protocols import Generators

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_VARIABLE = "NCVSD_WEIGHTS"

SHIPPED = ("ncvsd_faces64", "ncvsd_natural")
PUBLISHED = {"ncvsd_ffhq": ("xypeng9903/ncvsd", "ncvsd-ffhq256-xs.pkl")}
"""Priors that their authors publish: repository and file at Hugging Face."""

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
        name_or_path: a name of `list_priors()`; the path of a weights file, of its card, or of
            both without their suffix; a repository "owner/name" of the Hugging Face hub; or a
            foreign checkpoint (see `ncvsd_inverse.priors.convert.load_foreign`), which has no card.
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
    stem = _locate(name_or_path)
    if not _card_path(stem).is_file() and Path(name_or_path).expanduser().exists():
        return load_foreign(Path(name_or_path).expanduser(), device, dtype)
    card = _read_card(stem)
    where = torch.get_default_device() if device is None else torch.device(device)
    network = _read_network(stem, card).to(where).to_inference(dtype or inference_dtype(where))
    if card.gamma is None:
        return DiffusionPrior(
            network,
            image_shape=card.image_shape,
            sigma_min=card.sigma_min,
            sigma_max=card.sigma_max,
            card=card,
            statistics=card.statistics,
        )
    return NCVSDPrior(
        network,
        image_shape=card.image_shape,
        gamma=card.gamma,
        sigma_min=card.sigma_min,
        sigma_max=card.sigma_max,
        card=card,
        spread=card.spread,
        statistics=card.statistics,
    )


def load_network(name_or_path: str | Path) -> TrainedNetwork:
    """Load the network of a trained prior as it was trained, float32 on the CPU, to train on.

    Arguments and errors as for `load_prior`.
    """
    stem = _locate(name_or_path)
    network = _read_network(stem, _read_card(stem))
    if isinstance(network, LibraryDenoiser):
        raise CheckpointError(f"{stem} holds a network of another library, which does not train")
    return network


def load_card(name_or_path: str | Path) -> PriorCard:
    """Read the card of a trained prior, without its weights; arguments as for `load_prior`."""
    return _read_card(_locate(name_or_path))


def list_priors() -> list[str]:
    """Return the names that `load_prior` knows, sorted.

    They are the priors that ship with the package, those in the folder $NCVSD_WEIGHTS and in the
    cache folder, and those that their authors publish, whether here yet or not.
    """
    found = {card.stem for folder in _folders() for card in folder.glob("*.json")}
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
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    weights = safetensors.torch.save(state)
    digest = hashlib.sha256(weights).hexdigest()
    filled = {**card, "network": network_config(network), "sha256": digest}
    text = PriorCard.from_dict(filled).to_json()
    full = PriorCard.from_json(text)
    loaded = _filled_network(full, state)
    assert not isinstance(loaded, LibraryDenoiser)
    if not torch.allclose(_log_variance(loaded), _log_variance(network), atol=1e-2):
        raise ValueError("network must be as trained, not changed by to_inference")
    stem = Path(path_without_suffix)
    _write_whole([(_weights_path(stem), weights), (_card_path(stem), text.encode())])
    return full


class PriorHandle:
    """A prior by name that is loaded when it is first used; importing one loads nothing.

    It has every attribute of the `NCVSDPrior` that it stands for. `load()` returns that prior,
    always the same one.

    Args:
        name: a name that `load_prior` knows by the time of the first use.
    """

    nfe_per_sample = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._prior: NCVSDPrior | DiffusionPrior | None = None

    def load(self) -> NCVSDPrior | DiffusionPrior:
        """Return the prior, loading it at the first call; errors as for `load_prior`."""
        with self._lock:
            if self._prior is None:
                self._prior = load_prior(self.name)
            return self._prior

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ p(x0 | u), as `NCVSDPrior.sample`; shape (B, C, H, W)."""
        return self.load().sample(u, sigma, generator=generator)

    def __getattr__(self, name: str) -> object:
        # Copying, pickling and notebooks probe for underscored names: they must not load a prior.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.load(), name)

    def __repr__(self) -> str:
        state = "not loaded" if self._prior is None else "loaded"
        return f"<prior {self.name!r}, {state}>"


def _folders() -> list[Path]:
    """Return where priors are looked for by name, first come first served."""
    own = os.environ.get(WEIGHTS_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncvsd_inverse"
    return [PACKAGE_WEIGHTS, *([Path(own)] if own else []), cache]


def _weights_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def _card_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")


def _locate(name_or_path: str | Path) -> Path:
    """Return the path, without suffix, of the prior that a name or path means."""
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"prior must be a name or a path, got {type(name_or_path).__name__}")
    path = Path(name_or_path).expanduser()
    if path.suffix in (".safetensors", ".json"):
        return path.with_suffix("")
    if isinstance(name_or_path, Path) or path.name != name_or_path:
        if isinstance(name_or_path, str):
            from ncvsd_inverse.priors import hub

            if hub.is_repository(name_or_path):
                return hub.fetch_repository(name_or_path)
        return path
    for folder in _folders():
        if _card_path(folder / name_or_path).is_file():
            return folder / name_or_path
    if name_or_path in PUBLISHED:
        from ncvsd_inverse.priors import hub

        return hub.fetch_published(name_or_path)
    if name_or_path in SHIPPED:
        raise CheckpointError(_explain_absence(name_or_path))
    if path.exists():
        return path
    check_choice("prior", name_or_path, list_priors())
    return path


def _explain_absence(name: str) -> str:
    return (
        f"{name} needs {name}.safetensors and {name}.json, which are in none of "
        f"{', '.join(str(folder) for folder in _folders())} "
        f"(${WEIGHTS_VARIABLE} may name another folder); they do not ship with this version of the "
        "package"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"a prior needs its weights and its card, but there is no {path}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} must be readable: {error}") from error


def _read_card(stem: Path) -> PriorCard:
    path = _card_path(stem)
    try:
        return PriorCard.from_json(_read(path).decode())
    except ValueError as error:
        raise CheckpointError(f"{path} must be the card of a prior: {error}") from error


def _read_network(stem: Path, card: PriorCard) -> TrainedNetwork | LibraryDenoiser:
    """Build the network of a card and fill it with the weights beside it, all checked."""
    path = _weights_path(stem)
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.sha256:
        raise CheckpointError(
            f"{path} must have the SHA-256 of its card, {card.sha256}, got {digest}: "
            "it is damaged or belongs to another card"
        )
    try:
        return _filled_network(card, safetensors.torch.load(content))
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} must hold the network of its card: {error}") from error


def _filled_network(
    card: PriorCard, state: Mapping[str, Tensor]
) -> TrainedNetwork | LibraryDenoiser:
    """Return the network that `card` describes with the weights `state`; ValueError if unfit.

    It is first built without memory, so that a card cannot ask for more than `state` holds.
    """
    network = _build(card, "meta")
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    came = {name: tuple(value.shape) for name, value in state.items()}
    faults = {
        "missing": expected.keys() - came.keys(),
        "unexpected": came.keys() - expected.keys(),
        "of another shape": {n for n in expected.keys() & came.keys() if expected[n] != came[n]},
        "not finite": {n for n, value in state.items() if not bool(value.isfinite().all())},
    }
    if any(faults.values()):
        raise ValueError(
            "weights " + "; ".join(f"{fault}: {_listed(of)}" for fault, of in faults.items() if of)
        )
    network = _build(card, "cpu")
    network.load_state_dict(state)
    return network


def _build(card: PriorCard, device: str) -> TrainedNetwork | LibraryDenoiser:
    """Build the untrained network that `card` describes; ValueError if the card is wrong."""
    network = build_converted(card.network, device)
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


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + rest


def _log_variance(network: TrainedNetwork) -> Tensor:
    """Return one number that depends on how the weights are scaled, shape (1, 1, 1, 1)."""
    one = torch.ones(1, device=next(network.parameters()).device)
    with torch.no_grad():
        return network.log_variance(one).float().cpu()


def _write_whole(files: Sequence[tuple[Path, bytes]]) -> None:
    """Write files under temporary names in their folders, then rename them in order."""
    pairs = [(path.with_name(f".{path.name}.{os.getpid()}.tmp"), path) for path, _ in files]
    try:
        for (temporary, _), (_, content) in zip(pairs, files, strict=True):
            temporary.write_bytes(content)
        for temporary, path in pairs:
            temporary.replace(path)
    finally:
        for temporary, _ in pairs:
            temporary.unlink(missing_ok=True)
