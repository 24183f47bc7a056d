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

from collections.abc import Iterable, Sequence
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
    """Every `stride`-th row of what this rank holds, the same rows of all tensors of one size."""
    t = local(t)
    if type(t) not in (Tensor, nn.Parameter):  # a state in 8 bits, say: it can be copied, not cut
        t = torch.empty(t.shape, dtype=torch.float32, device=t.device).copy_(t)
    return t[::stride] if t.dim() else t


def step_sizes(group: dict[str, Any], step: Any, moments: Sequence[Tensor]) -> tuple[Tensor | float, Tensor, float]:
    """(p, u, b) of elements with these moments, which the optimizer had before their gradient, written into them."""
    lr = group["lr"]
    if "betas" in group:
        (beta1, beta2), (m, v) = group["betas"], moments
        p = v.div_(1.0 - beta2**step).sqrt_().add_(group["eps"]).reciprocal_().mul_(lr)
        return p, m.mul_(p).div_(1.0 - beta1**step), beta1
    (buffer,) = moments
    return lr / (1.0 - group["momentum"]), buffer.mul_(lr), group["momentum"]


class Progress:
    """Reads by how much parameters of one device make the loss fall in a step.

    Few rows of many parameters are read, and a call of torch takes longer to start than to do so little: the rows of
    all parameters of a group that have made as many steps are joined, and computed with at once.

    params  the parameters
    stride  every which row of a parameter is read
    sizes   elements of these rows, by parameter
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], stride: int) -> None:
        self.params, self.stride = params, stride
        self._optimizer = optimizer
        self.sizes = [rows_of(p, stride).numel() for p in params]
        self._elements = torch.tensor(self.sizes, dtype=torch.float64, device=params[0].device)

    def read(self, inv_scale: Tensor | None, found_inf: Tensor | None, before: Sequence[Tensor | None]) -> Tensor:
        """float64 [params, 2]: fall and elements of the rows that were read; NaN without a gradient or a state.

        before  what `gradients` returned in the step before
        """
        states = self._optimizer.state
        known = {
            i: h for i, (p, h) in enumerate(zip(self.params, before, strict=True)) if h is not None and states.get(p)
        }
        falls = [self._elements.new_full((), torch.nan)] * len(self.params)
        for group, step, alike in self._alike(known):
            names = ("exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)
            moments = [self._joined([states[self.params[i]][name] for i in alike]) for name in names]
            p, u, b = step_sizes(group, step, moments)
            h = torch.cat([known[i] for i in alike]).float()
            moves = u.mul_((1.0 + b) * (2.0 * b - 1.0)).add_(h.mul_(p).mul_(1.0 - b))
            products = moves.mul_(self._gradients(alike, group, inv_scale, found_inf))
            for i, part in zip(alike, products.split([self.sizes[i] for i in alike]), strict=True):
                falls[i] = part.sum(dtype=torch.float64) / (2.0 * b * b)
        fall = torch.stack(falls)
        return torch.stack([fall, self._elements.where(fall.isfinite(), torch.nan)], dim=1)

    def gradients(self, inv_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor | None]:
        """The rows of all gradients, each parameter's one after another, for the next call of `read`.

        In bfloat16: what rounding adds to a sum of products with other batches has no mean, and is small.
        """
        rows: list[Tensor | None] = [None] * len(self.params)
        for group, _, alike in self._alike(range(len(self.params))):
            joined = self._gradients(alike, group, inv_scale, found_inf).bfloat16()
            for i, part in zip(alike, joined.split([self.sizes[i] for i in alike]), strict=True):
                rows[i] = part
        return rows

    def _alike(self, chosen: Iterable[int]) -> Iterable[tuple[dict[str, Any], Any, list[int]]]:
        """(group, step, which parameters): those of the chosen ones that have a gradient, alike in group and step."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        sets: dict[tuple[int, Any], tuple[dict[str, Any], Any, list[int]]] = {}
        for i in chosen:
            p = self.params[i]
            if p.grad is None or p.grad.is_sparse:
                continue
            group, step = groups[id(p)], self._optimizer.state.get(p, {}).get("step")
            # To compare steps that are on a device would be to wait for it.
            on_device = isinstance(step, Tensor) and step.device.type != "cpu"
            key = id(step) if on_device or step is None else float(step)
            sets.setdefault((id(group), key), (group, step, []))[2].append(i)
        return sets.values()

    def _joined(self, tensors: Iterable[Tensor]) -> Tensor:
        """float32 copies of their rows, one after another."""
        rows = [rows_of(t, self.stride) for t in tensors]
        sizes = [t.numel() for t in rows]
        joined = torch.empty(sum(sizes), dtype=torch.float32, device=rows[0].device)
        torch._foreach_copy_([to.view(t.shape) for to, t in zip(joined.split(sizes), rows, strict=True)], rows)
        return joined

    def _gradients(
        self, alike: Sequence[int], group: dict[str, Any], inv_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """Rows of gradients as the optimizer will use them; NaN in a step that is skipped."""
        g = self._joined([p.grad for i in alike if (p := self.params[i]).grad is not None])
        if inv_scale is not None:
            g *= inv_scale.to(g.device)
        if found_inf is not None:
            g.masked_fill_(found_inf.to(g.device).bool(), torch.nan)
        return -g if group.get("maximize") else g
