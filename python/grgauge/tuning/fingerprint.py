"""What tells one data set from another: its length, and a few samples as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .state import random_state, set_random_state


@dataclass(frozen=True)
class Fingerprint:
    """Number of samples, and a digest of the first, the middle and the last: None if they differ from look to look, as
    augmented ones do."""

    samples: int
    digest: str | None

    def differs(self, other: Fingerprint) -> bool:
        known = self.digest is not None and other.digest is not None
        return self.samples != other.samples or (known and self.digest != other.digest)


def fingerprint(dataset: Dataset[Any], **options: Any) -> Fingerprint:
    """`options` are of the DataLoader that reads the samples: in a worker if the user's are read there, since a file
    that was opened here would be shared with all of them. Draws no random numbers."""
    length = len(dataset)  # type: ignore[arg-type]
    places = sorted({0, length // 2, length - 1})
    before = random_state()
    try:
        generator = torch.Generator().manual_seed(0)
        looks = DataLoader(
            dataset, batch_size=None, sampler=[*places, *places], collate_fn=_as_it_is, generator=generator, **options
        )
        digests = [_digest(sample) for sample in looks]
    finally:
        set_random_state(before)
    first, second = digests[: len(places)], digests[len(places) :]
    return Fingerprint(length, hashlib.sha256("".join(first).encode()).hexdigest()[:16] if first == second else None)


def parts_of(value: Any) -> Iterator[Any]:
    """A value and all that it is made of: entries of mappings, lists and tuples, fields of dataclasses."""
    yield value
    if isinstance(value, Mapping):
        inner: list[Any] = [part for item in value.items() for part in item]
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, entry.name) for entry in fields(value)]
    else:
        return
    for part in inner:
        yield from parts_of(part)


def _as_it_is(sample: Any) -> Any:
    return sample


def _digest(sample: Any) -> str:
    found = hashlib.sha256()
    for part in parts_of(sample):
        found.update(f"{type(part).__name__} ".encode())
        if isinstance(part, Tensor) and part.layout == torch.strided:
            found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape} ".encode())
            found.update(b"" if part.dtype.hasobject else part.tobytes())
        elif isinstance(part, (str, bytes, int, float, complex, np.generic)):
            found.update(repr(part).encode())
        elif not isinstance(part, Tensor) and hasattr(part, "tobytes"):  # an image of PIL's
            found.update(part.tobytes())
    return found.hexdigest()
