"""What an optimizer's updates do to the loss, to first order: what `metric="signal"` reads. Torch only, no decisions.

Write u for the update that the optimizer is about to repeat, before it has seen gradient g, and p for its step size per
element: w -= u, with

    Adam   p = lr / (sqrt(v_hat) + eps)    u = p m_hat
    SGD    p = lr / (1 - momentum)         u = lr momentum_buffer

    drift      sum u g         what the loss of a batch that had no part in u loses along u
    unrest     sum p g^2 / 4   the excess loss that noise in the gradients keeps up at this learning rate

The drift is the noise-corrected signal. From m_t = beta m_(t-1) + (1 - beta) g_t follows

    2 beta (1 - beta) <m_(t-1), g_t> = |m_t|^2 - beta^2 |m_(t-1)|^2 - (1 - beta)^2 |g_t|^2:

summed over steps, <m, g> is |m|^2 without the products of gradients with themselves, which are the floor at which pure
noise reads 19 for beta = 0.9. So noise has the expectation zero, from the first step on and for any beta, and no floor
has to be estimated.

The unrest is what is won once the learning rate falls to zero, and no drift shows it. For one coordinate with curvature
h and noise of variance s^2, w -= p (h w + noise) settles at the variance p s^2 / (2 h), so at the excess loss
p s^2 / 4, whatever h is. Directions too flat to have settled have less: it is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import local

COLUMNS = ("drift", "unrest", "elements")


def require_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless all that the optimizer updates has one of the two forms above."""
    for group in optimizer.param_groups:
        if "betas" not in group and not group.get("momentum"):
            raise ValueError(
                f"optimizer is {type(optimizer).__name__} without momentum; with metric 'signal' it must be one that "
                "keeps Adam's two moments or SGD's momentum"
            )


def rows_of(t: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row of what this rank holds: a view, the same rows of all tensors of one size."""
    t = local(t)
    return t[::stride] if t.dim() else t


def step_sizes(state: dict[str, Any], group: dict[str, Any], g: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """(p, u) of the rows that g has, from the state that the optimizer had before g."""
    lr = group["lr"]
    if "betas" in group:
        beta1, beta2 = group["betas"]
        m, v = (rows_of(state[name], stride).float() for name in ("exp_avg", "exp_avg_sq"))
        p = lr / ((v / (1.0 - beta2 ** state["step"])).sqrt() + group["eps"])
        return p, p * m / (1.0 - beta1 ** state["step"])
    p = lr / (1.0 - group["momentum"]) * torch.ones_like(g)
    return p, lr * rows_of(state["momentum_buffer"], stride).float()


class Progress:
    """Reads drift and unrest of parameters of one device.

    params  the parameters
    stride  every which row of a parameter is read
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], stride: int) -> None:
        self.params, self.stride = params, stride
        self._optimizer = optimizer

    def read(self, inv_scale: Tensor | None, found_inf: Tensor | None, earlier: Sequence[Tensor | None]) -> Tensor:
        """float64 [params, 3]: `COLUMNS`, of the rows that were read; NaN without a gradient or a state.

        earlier  of each parameter None, or a gradient that takes the place of m_hat in u: how much an update along it
                 would bring. That of a frozen matrix, whose m is from another time.
        """
        rows = []
        for p, group, before in zip(self.params, self._groups(), earlier, strict=True):
            row = torch.full((3,), torch.nan, dtype=torch.float64, device=p.device)
            rows.append(row)
            state = self._optimizer.state.get(p)
            g = self._gradient(p, group, inv_scale, found_inf)
            if g is None or not state:
                continue
            step, update = step_sizes(state, group, g, self.stride)
            if before is not None:
                update = step * before
            row[0] = (update * g).sum(dtype=torch.float64)
            row[1] = (step * g * g).sum(dtype=torch.float64) / 4.0
            row[2] = g.numel()
        return torch.stack(rows)

    def gradients(
        self, inv_scale: Tensor | None, found_inf: Tensor | None, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Copies of the rows of the wanted gradients, for the next call of `read`."""
        found = [
            self._gradient(p, group, inv_scale, found_inf) if want else None
            for p, group, want in zip(self.params, self._groups(), wanted, strict=True)
        ]
        return [None if g is None else g.clone() for g in found]

    def _groups(self) -> list[dict[str, Any]]:
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return [groups[id(p)] for p in self.params]

    def _gradient(
        self, p: nn.Parameter, group: dict[str, Any], inv_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor | None:
        """The rows of a gradient as the optimizer will use them; NaN in a step that is skipped."""
        if p.grad is None or p.grad.is_sparse:
            return None
        g = rows_of(p.grad, self.stride).float()
        if inv_scale is not None:
            g = g * inv_scale.to(g.device)
        if found_inf is not None:
            g = g.masked_fill(found_inf.to(g.device).bool(), torch.nan)
        return -g if group.get("maximize") else g
