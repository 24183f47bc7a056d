"""What an optimizer's updates do to the loss of other batches: what `metric="signal"` reads. No decisions.

Write u for the update that moved the weights to where gradient g was taken, h for the gradient of the step before, p
for the optimizer's step size per element and b for its momentum: w -= u, with

    Adam   p = lr / (sqrt(v_hat) + eps)    u = p m_hat
    SGD    p = lr / (1 - momentum)         u = lr momentum_buffer

    fall   ((1 + b) (2 b - 1) sum u g + (1 - b) sum p h g) / (2 b^2)

That is by how much the loss falls in a step. Along a step the gradient changes from that at its beginning to that at
its end, and the loss falls by the update times the mean of the two. Summed over steps, every gradient meets half of the
update before it and half of the one after it, b u + (1 - b) p g. That would be

    (1 + b) / 2 sum u g + (1 - b) / 2 sum p g g

were it not for the noise in g, which the last sum squares. Its signal alone is in sum p h g, but for what h did to the
weights since: less by (1 - b) X, as sum u g is by X / (1 + b), where noise of variance s^2 meets curvature c and
X = sum p^2 c s^2. So sum p g g without the noise is (sum p h g - (1 - b^2) sum u g) / b^2.

Every product is of batches that have nothing in common, and noise has the expectation zero: no floor has to be
estimated, such as the one at which pure noise reads 19 for b = 0.9. sum u g alone would not do: it is negative where
the loss stands still, by what noise did to the weights and the next gradients undo.

What a batch gains by its own step is left out. Of texts that are seen again and again, that is what is learned by
heart. What remains is what one batch teaches about another, which is what unseen text gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import local


def require_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless all that the optimizer updates has one of the two forms above, and b >= 0.5."""
    for group in optimizer.param_groups:
        beta = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
        if not beta >= 0.5:
            raise ValueError(
                f"optimizer is {type(optimizer).__name__} with momentum {float(beta):g}; with metric 'signal' it must "
                "be one that keeps Adam's two moments or SGD's momentum, of 0.5 or more"
            )


def rows_of(t: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row of what this rank holds: a view, the same rows of all tensors of one size."""
    t = local(t)
    return t[::stride] if t.dim() else t


def step_sizes(state: dict[str, Any], group: dict[str, Any], g: Tensor, stride: int) -> tuple[Tensor, Tensor, float]:
    """(p, u, b) of the rows that g has, from the state that the optimizer had before g."""
    lr = group["lr"]
    if "betas" in group:
        beta1, beta2 = group["betas"]
        m, v = (rows_of(state[name], stride).float() for name in ("exp_avg", "exp_avg_sq"))
        p = lr / ((v / (1.0 - beta2 ** state["step"])).sqrt() + group["eps"])
        return p, p * m / (1.0 - beta1 ** state["step"]), beta1
    p = lr / (1.0 - group["momentum"]) * torch.ones_like(g)
    return p, lr * rows_of(state["momentum_buffer"], stride).float(), group["momentum"]


class Progress:
    """Reads by how much parameters of one device make the loss fall in a step.

    params  the parameters
    stride  every which row of a parameter is read
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], stride: int) -> None:
        self.params, self.stride = params, stride
        self._optimizer = optimizer

    def read(self, inv_scale: Tensor | None, found_inf: Tensor | None, before: Sequence[Tensor | None]) -> Tensor:
        """float64 [params, 2]: fall and elements of the rows that were read; NaN without a gradient or a state.

        before  what `gradients` returned in the step before
        """
        rows = []
        for p, group, h in zip(self.params, self._groups(), before, strict=True):
            row = torch.full((2,), torch.nan, dtype=torch.float64, device=p.device)
            rows.append(row)
            state = self._optimizer.state.get(p)
            g = self._gradient(p, group, inv_scale, found_inf)
            if g is None or h is None or not state:
                continue
            step, update, b = step_sizes(state, group, g, self.stride)
            moves = update * ((1.0 + b) * (2.0 * b - 1.0)) + step * h * (1.0 - b)
            row[0] = (moves * g).sum(dtype=torch.float64) / (2.0 * b * b)
            row[1] = g.numel()
        return torch.stack(rows)

    def gradients(self, inv_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor | None]:
        """Copies of the rows of all gradients, for the next call of `read`."""
        found = [
            self._gradient(p, group, inv_scale, found_inf) for p, group in zip(self.params, self._groups(), strict=True)
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
