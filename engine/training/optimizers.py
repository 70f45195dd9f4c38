"""SGD and AdamW for the training loop, over the functions that torch.optim.SGD and torch.optim.AdamW call themselves.

Those two classes import torch's compiler when they are first used, which takes as long as importing torch. These do
not, so a run reaches its first step sooner. Results are equal to the last bit. So is the form of the state, which
checkpoints hold.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class Optimizer(ABC):
    """Groups of parameters, each with its own settings, which a schedule changes; and the state of each parameter.

    param_groups: dicts with "params", a list of tensors, and the settings. A parameter without a gradient is left as it
    is, and has no state before its first gradient.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.param_groups = [settings | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = self.first_state(parameter)
            self.update(group, parameters, [self.state[parameter] for parameter in parameters])

    @abstractmethod
    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first gradient."""

    @abstractmethod
    def update(self, group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """Move the parameters of a group, and their states, by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad.zero_()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """{"state": {number: tensors by name}, "param_groups": [settings, with numbers instead of parameters]}"""
        number = {parameter: n for n, parameter in enumerate(self._parameters())}
        groups = [group | {"params": [number[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": {number[p]: state for p, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over the state of the parameters; settings stay. ValueError for that of other groups or another kind."""
        sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the saved optimizer has groups of {sizes[0]} parameters, expected {sizes[1]}")
        names = list(self.first_state(torch.zeros(1)))
        for state in saved["state"].values():
            if sorted(state) != sorted(names):
                raise ValueError(f"the saved optimizer holds {', '.join(state)}, expected {', '.join(names)}")
        parameters = self._parameters()
        self.state = {
            parameters[number]: {name: value.to(parameters[number]) for name, value in state.items()}
            for number, state in saved["state"].items()
        }


class Sgd(Optimizer):
    """SGD with momentum m, Nesterov's if it is above 0 (Sutskever et al., ICML 2013). With gradient g and rate r:

    g <- g + weight_decay w
    b <- m b + g               from b = 0
    w <- w - r (g + m b)
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def update(self, group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        sgd(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["momentum_buffer"] for state in states],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            fused=True,
        )


class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101), with betas b1 and b2, e = 1e-8, and rate r, at a parameter's step t = 1, 2, ...

    w <- w - r weight_decay w
    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2        from m = v = 0
    w <- w - r (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + e)
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=1e-8)

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=parameter.device)} | moments

    def update(self, group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
