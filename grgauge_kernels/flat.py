"""Gradients, and whatever else is laid out like them, as views of one flat buffer per device and dtype."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import accumulate
from types import TracebackType

import torch
from torch import Tensor

from .bucket import Bucket, is_dense, require_dense

ALIGNMENT = 64
"""Elements: every segment starts at a multiple of this, so 128 B for two-byte dtypes and 256 B for float32."""

_grad_of = operator.attrgetter("grad")


def flat_views(tensors: Sequence[Tensor], dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A flat buffer of zeros with room for `tensors`, of one device, and a view of it shaped and laid out like each.

    A tensor with gaps between its elements gets a contiguous view.

    Large buffers all begin at the same offset within a page. Processors compare pending loads and stores by that offset
    first, so a store to one buffer can delay a load from another: give buffers that are read together different shifts.

    Args:
        tensors: What the views are like.
        dtype: The dtype of the buffer.
        shift: Elements left free at the beginning, a multiple of ALIGNMENT.
    """
    room = [-(-t.numel() // ALIGNMENT) * ALIGNMENT for t in tensors]
    *starts, extent = accumulate(room, initial=shift)
    buffer = torch.zeros(extent, dtype=dtype, device=tensors[0].device if tensors else None)
    views = []
    for t, start in zip(tensors, starts, strict=True):
        place = buffer[start : start + t.numel()]
        views.append(place.as_strided(t.shape, t.stride()) if is_dense(t) else place.view(t.shape))
    return buffer, views


class FlatBucket:
    """The gradients of parameters of one device and dtype, as views of one flat buffer.

    Args:
        params: The parameters, one a segment.

    Attributes:
        grad: Flat buffer of their gradients; [extent], with zeros between segments.
        bucket: The segments, counted from the start of the buffer.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.grad, self._views = flat_views(self.params, self.params[0].dtype)
        self._addresses = list(map(Tensor.data_ptr, self._views))
        self.bucket = Bucket(self._views, base=self.grad)
        self.attach()

    def __repr__(self) -> str:
        return f"FlatBucket({len(self.params)} parameters, {self.bucket.numel} elements, {self.grad.dtype})"

    def intact(self) -> bool:
        """True if every gradient that exists is still its view of the buffer."""
        return all(
            grad is None or (grad is view and grad.data_ptr() == address)
            for grad, view, address in zip(map(_grad_of, self.params), self._views, self._addresses, strict=True)
        )

    @property
    def missing(self) -> tuple[int, ...]:
        """The segments that have no gradient now."""
        return tuple([i for i, p in enumerate(self.params) if p.grad is None])

    @torch.no_grad()
    def attach(self) -> None:
        """Copy gradients that are elsewhere into the buffer, and make them views of it again.

        A parameter without a gradient stays without one, and its place in the buffer holds zeros.

        Raises:
            RuntimeError: For a sparse gradient, before anything is moved.
        """
        for i, p in enumerate(self.params):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(f"the gradient of parameter {i} is sparse ({p.grad.layout}); it must be dense")
        for i, (p, address) in enumerate(zip(self.params, self._addresses, strict=True)):
            view = self._views[i]
            if view.data_ptr() != address:  # the view itself has been given other memory (grad.data = ...)
                self._views[i] = view = _restored(self.grad, view, address)
            if p.grad is None:
                view.zero_()
            elif p.grad is not view:
                p.grad = view.copy_(p.grad)

    def zero_grad(self) -> None:
        """Zero the gradients in place; those that are None stay None."""
        self.attach()
        self.grad.zero_()

    @torch.no_grad()
    def detach(self) -> None:
        """Give every gradient memory of its own again, values unchanged."""
        for p, view in zip(self.params, self._views, strict=True):
            if p.grad is view:
                p.grad = torch.empty_like(p).copy_(view)


class FlatBuckets:
    """Make gradients, as they appear, views of one flat buffer per device and dtype.

    Parameters keep their own memory, so names, state_dict, tied weights and whatever saves or shares a model are
    untouched. Gradients accumulate into the views; `zero_grad` of this class zeroes them in place. Use it as a context
    manager, or call `detach()`, to give every gradient memory of its own again.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> flat = FlatBuckets(model.parameters())
        >>> flat.buckets
        [FlatBucket(2 parameters, 8 elements, torch.float32)]
        >>> flat.detach()

    Args:
        params: Parameters of any devices and dtypes. Frozen ones (requires_grad=False) are left out.

    Raises:
        TypeError: If no bucket holds parameters of that dtype.
        ValueError: If a parameter has gaps between its elements.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for i, p in enumerate({id(p): p for p in params}.values()):
            if p.requires_grad:
                require_dense(p, f"params[{i}]")
                groups.setdefault((p.device, p.dtype), []).append(p)
        self.buckets = [FlatBucket(group) for group in groups.values()]

    def intact(self) -> bool:
        """True if every gradient that exists is a view of its buffer."""
        return all(b.intact() for b in self.buckets)

    def attach(self) -> None:
        """Copy gradients that are elsewhere back into the buffers."""
        for b in self.buckets:
            b.attach()

    def zero_grad(self) -> None:
        """Zero the gradients in place; those that are None stay None."""
        for b in self.buckets:
            b.zero_grad()

    def detach(self) -> None:
        """Give every gradient memory of its own again, values unchanged."""
        for b in self.buckets:
            b.detach()

    def __enter__(self) -> FlatBuckets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _restored(buffer: Tensor, view: Tensor, address: int) -> Tensor:
    start = (address - buffer.data_ptr()) // buffer.element_size()
    return buffer.as_strided(view.shape, view.stride(), start)
