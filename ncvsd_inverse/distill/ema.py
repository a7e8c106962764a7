"""Power-function averages of weights; they must not know what is trained.

Source: Karras et al., arXiv 2312.02696, section 3.1.
"""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after optimiser step number `step`, the first being 1."""
        for std, average in self.averages.items():
            keep = (1 - 1 / step) ** (power_exponent(std) + 1)
            targets: list[Tensor] = list(average.parameters())
            sources: list[Tensor] = [source.detach() for source in module.parameters()]
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
