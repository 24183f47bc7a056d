"""Parameters and gradients re-homed as views of one flat buffer per device and dtype."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from .bucket import Bucket, require_dense

ALIGNMENT = 64
"""Elements: every segment starts at a multiple of this, so 128 B for two-byte dtypes and 256 B for float32."""

_grad_of = operator.attrgetter("grad")


class FlatBucket:
    """The parameters of one device and dtype, as views of two flat buffers.

    Args:
        params: The parameters, one a segment.

    Attributes:
        param: Flat buffer of their values; [extent], with zeros between segments.
        grad: Flat buffer of their gradients, laid out alike.
        bucket: The segments, counted from the start of either buffer.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        first = self.params[0]
        starts, extent = [], 0
        for p in self.params:
            starts.append(extent)
            extent += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        self.param = torch.zeros(extent, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.param)
        self._starts = starts
        self._values = self.views(self.param)
        self._grads = self.views(self.grad)
        self._addresses = [v.data_ptr() for v in self._values]
        self._attached: list[Tensor | None] = [None] * len(self.params)
        self.bucket = Bucket(self._values, base=self.param)
        self.attach()

    def __repr__(self) -> str:
        return f"FlatBucket({len(self.params)} parameters, {self.bucket.numel} elements, {self.param.dtype})"

    def views(self, flat: Tensor) -> list[Tensor]:
        """A view of `flat` for each segment, with its parameter's shape and strides."""
        return [flat.as_strided(p.shape, p.stride(), s) for p, s in zip(self.params, self._starts, strict=True)]

    def intact(self) -> bool:
        """True if every parameter and every gradient still is what the last `attach` left."""
        # Both scans run in the interpreter's own C loops, 0.2 us a tensor: the only per-tensor work of a step.
        return (
            all(map(operator.is_, map(_grad_of, self.params), self._attached))
            and list(map(Tensor.data_ptr, self.params)) == self._addresses
        )

    @property
    def missing(self) -> tuple[int, ...]:
        """The segments that had no gradient at the last `attach`."""
        return tuple([i for i, grad in enumerate(self._attached) if grad is None])

    def movable(self) -> bool:
        """True if every parameter still has the dtype and device of the buffer, so that `attach` can take it back."""
        return all(p.dtype == self.param.dtype and p.device == self.param.device for p in self.params)

    @torch.no_grad()
    def attach(self) -> tuple[int, int]:
        """Copy values and gradients that live elsewhere into the buffers and make them views again.

        A parameter without a gradient stays without one: as in torch, an optimizer leaves it alone.

        Returns:
            How many values and how many once attached gradients were taken back.

        Raises:
            RuntimeError: For a sparse gradient, before anything is moved.
        """
        for i, p in enumerate(self.params):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(f"the gradient of parameter {i} is sparse ({p.grad.layout}); it must be dense")
        values = grads = 0
        for i, p in enumerate(self.params):
            if p.data_ptr() != self._addresses[i]:
                self._values[i].copy_(p)
                p.data = self._values[i]
                values += 1
            if p.grad is None:
                self._grads[i].zero_()
            elif p.grad is not self._grads[i]:
                self._grads[i].copy_(p.grad)
                p.grad = self._grads[i]
                grads += self._attached[i] is not None
            self._attached[i] = p.grad
        return values, grads

    def zero_grad(self) -> None:
        """Zero the gradients in place; those that were set to None stay None."""
        if not self.intact():
            self.attach()
        self.grad.zero_()

    @torch.no_grad()
    def detach(self) -> None:
        """Give every parameter and gradient memory of its own again, values unchanged."""
        for i, p in enumerate(self.params):
            if p.data_ptr() == self._addresses[i]:
                p.data = torch.empty_like(p).copy_(self._values[i])
            if p.grad is self._grads[i]:
                p.grad = torch.empty_like(p).copy_(self._grads[i])


class FlatBuckets:
    """Re-home parameters, and their gradients as they appear, as views of one flat buffer per device and dtype.

    Parameter objects stay the same, so names, state_dict and weights tied by sharing a Parameter are untouched. Use it
    as a context manager, or call `detach()`, to give every tensor memory of its own again.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> flat = FlatBuckets(model.parameters())
        >>> flat.buckets
        [FlatBucket(2 parameters, 8 elements, torch.float32)]
        >>> flat.detach()

    Args:
        params: Parameters of any devices and dtypes. Frozen ones (requires_grad=False) are left where they are.

    Raises:
        ValueError: If two parameters share memory without being one object, or one is not dense: re-homing would
            silently untie them.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for i, p in enumerate({id(p): p for p in params}.values()):
            if p.requires_grad:
                require_dense(p, f"params[{i}]")
                groups.setdefault((p.device, p.dtype), []).append(p)
        require_disjoint([p for group in groups.values() for p in group])
        self.buckets = [FlatBucket(group) for group in groups.values()]

    def intact(self) -> bool:
        """True if every parameter and every gradient is still a view of its buffer."""
        return all(b.intact() for b in self.buckets)

    def attach(self) -> None:
        """Take back whatever has moved out of the buffers, by copying it in."""
        for b in self.buckets:
            b.attach()

    def zero_grad(self) -> None:
        """Zero the gradients in place; those that were set to None stay None."""
        for b in self.buckets:
            b.zero_grad()

    def detach(self) -> None:
        """Give every parameter and gradient memory of its own again, values unchanged."""
        for b in self.buckets:
            b.detach()

    def __enter__(self) -> FlatBuckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def require_disjoint(params: Sequence[Tensor]) -> None:
    """Raise ValueError if two of the tensors share memory."""
    spans = sorted((p.data_ptr(), p.numel() * p.element_size(), i) for i, p in enumerate(params) if p.numel())
    for (start, size, i), (other, _, j) in itertools.pairwise(spans):
        if start + size > other:
            raise ValueError(
                f"params[{i}] and params[{j}] share memory but are two objects; tie weights by sharing one Parameter"
            )
