"""Tensors as an op needs them: one for each segment, with everything that a kernel must know about them.

An op checks everything that it is given, and with small tensors a training step consists mostly of checks. So one call
looks up what they need for all tensors, through DLPack's exchange API where torch and the compiled library have it.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from .backends import native


class Stream(tuple[Tensor, ...]):
    """Tensors of one device and dtype, with their addresses, sizes and layouts; an op takes these as they are.

    Before you pass a stream that you have kept to an op, call `stands`: the op does not look at the tensors
    again.

    Made from an iterable of tensors: one for each segment, or the one flat buffer.

    Raises:
        RuntimeError: For tensors without an address, such as sparse ones.

    Attributes:
        addresses: uint64 [tensors], the addresses of the first elements.
        sizes: uint64 [tensors], numbers of elements.
        in_order: True if all have one device and one dtype, and are row-major.
        checked_for: What an op has found the stream to fit, so that it need not look again; None before that.

    Examples:
        >>> import torch
        >>> stream = Stream([torch.zeros(2, 3), torch.zeros(4)])
        >>> list(stream.sizes), stream.in_order, stream.stands()
        ([6, 4], True, True)
        >>> stream[0].data = torch.zeros(6)
        >>> stream.stands()
        False
    """

    addresses: array[int]
    sizes: array[int]
    in_order: bool
    checked_for: object
    _objects: array[int]
    _facts: array[int]

    def __new__(cls, tensors: Iterable[Tensor]) -> Stream:
        self = super().__new__(cls, tensors)
        n = len(self)
        self._objects = array("Q", map(id, self))
        self._facts = facts = _describe(self, self._objects)
        self.addresses, self.sizes, kinds = facts[:n], facts[n : 2 * n], facts[2 * n :]
        self.checked_for = None
        self.in_order = not n or (kinds[0] & 0xFFFFFFFF == 0 and kinds == kinds[:1] * n)
        return self

    def stands(self, tensors: Sequence[Tensor] | None = None) -> bool:
        """True if the addresses, sizes, dtypes and strides are what they were when the stream was made.

        Args:
            tensors: Other tensors to compare in place of the stream's own.
        """
        if tensors is None:
            return _describe(self, self._objects) == self._facts
        return Stream(tensors)._facts == self._facts


def addresses_of(tensors: Sequence[Tensor]) -> array[int]:
    """The addresses of the first elements, uint64 [tensors]."""
    return tensors.addresses if isinstance(tensors, Stream) else array("Q", map(Tensor.data_ptr, tensors))


def _describe(tensors: Sequence[Tensor], objects: array[int]) -> array[int]:
    """uint64 [3 tensors]: addresses, numbers of elements, and kinds, the lower half of which is 0 if row-major."""
    describe = _through_dlpack()
    if describe is None:
        return _asked_one_by_one(tensors)
    try:
        return describe(objects)
    except RuntimeError:  # sparse, say, or on a device that DLPack does not know
        return _asked_one_by_one(tensors)


def _asked_one_by_one(tensors: Sequence[Tensor]) -> array[int]:
    kinds = (
        (hash((t.dtype, t.device)) & 0xFFFFFFFF) << 32
        | (0 if t.is_contiguous() else (hash(t.stride()) & 0xFFFFFFFF | 1))
        for t in tensors
    )
    return array("Q", [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *kinds])


@functools.cache
def _through_dlpack() -> Callable[[array[int]], array[int]] | None:
    """`_describe` by the compiled library, from the tensors' ids; None where the library or torch's API is missing."""
    library = native.load("grgauge_cpu", "a C++ compiler")
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if isinstance(library, str) or capsule is None:
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    exchange_api = pointer_of(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(exchange_api).value != 1:  # its major version
        return None
    # PyDLL keeps the interpreter's lock, and raises the exception that the call has set.
    function = ctypes.PyDLL(library._name).grgauge_cpu_describe
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]

    def describe(objects: array[int]) -> array[int]:
        facts = objects * 3
        function(exchange_api, objects.buffer_info()[0], len(objects), facts.buffer_info()[0])
        return facts

    return describe
