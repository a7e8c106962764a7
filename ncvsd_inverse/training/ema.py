"""Power-function averages of weights.

Source: Karras et al., arXiv 2312.02696, section 3 and appendix C.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ncvsd_inverse.numerics import local_part

__all__ = [
    "PowerEMA",
    "combination_weights",
    "power_exponent",
]


def power_exponent(std: float) -> float:
    """Return the exponent of the power-function profile whose relative std is `std`.

    The profile weighs step tau of t by tau^exponent; its relative std is
    sqrt((g + 1) / ((g + 2)^2 (g + 3))), here solved for g. `std` lies in (0, 0.2887).
    """
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA:
    """Averages of one module's parameters, one for each relative std.

    Attributes:
        averages: the averaged modules, by std.
    """

    def __init__(self, module: nn.Module, stds: tuple[float, ...]) -> None:
        self.averages = {std: copy.deepcopy(module).requires_grad_(False) for std in stds}
        self._exponents = {std: power_exponent(std) for std in stds}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after optimiser step number `step`, the first being 1."""
        for std, average in self.averages.items():
            keep = (1 - 1 / step) ** (self._exponents[std] + 1)
            targets = [local_part(target) for target in average.parameters()]
            sources = [local_part(source.detach()) for source in module.parameters()]
            torch._foreach_lerp_(targets, sources, 1 - keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all averages as named tensors."""
        return {
            f"{std}.{name}": value
            for std, average in self.averages.items()
            for name, value in average.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        for std, average in self.averages.items():
            prefix = f"{std}."
            average.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )


def combination_weights(
    steps: Sequence[int], stds: Sequence[float], target_step: int, target_std: float
) -> list[float]:
    """Return the weights of stored averages whose sum is nearest to an average of another std.

    Nearest in the mean square of the profiles, the weights that an average gives to the steps
    of the run: power functions (g + 1) tau^g / t^(g + 1) up to its own step t.

    Args:
        steps: step at which each average was stored, >= 1.
        stds: relative std of each, in (0, 0.2887).
        target_step: step at which the wanted average ends.
        target_std: its relative std.
    """
    ends = np.array([*steps, target_step], dtype=np.float64)
    powers = np.array([power_exponent(std) for std in (*stds, target_std)])

    def overlap(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the integral of two profiles' product, up to the earlier of their ends."""
        a, b, g, h = ends[i], ends[j], powers[i], powers[j]
        first = np.minimum(a, b)
        # In logarithms: the powers overflow for long runs and short averages.
        log = (g + h + 1) * np.log(first) - (g + 1) * np.log(a) - (h + 1) * np.log(b)
        result: np.ndarray = (g + 1) * (h + 1) / (g + h + 1) * np.exp(log)
        return result

    stored, wanted = np.arange(len(ends) - 1), np.full(1, len(ends) - 1)
    gram = overlap(stored[:, None], stored[None, :])
    weights = np.linalg.lstsq(gram, overlap(stored, wanted), rcond=None)[0]
    return [float(weight) for weight in weights]
