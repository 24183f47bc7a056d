"""States as files that survive a `kill -9` at any moment, and tell if they have been damaged.

The newest is "last.pt", the one before it "previous.pt"; those to go back to have names of their own. Each is what
torch.save writes, and the SHA-256 of that at its end.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from .errors import DamagedError, StorageError, TrainingError

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.pt", "previous.pt"


def serialize(state: dict[str, Any]) -> bytes:
    """A copy on the host, which training cannot change."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def deserialize(state: bytes) -> dict[str, Any]:
    # Schedulers and optimizers may keep objects of any class in their states; these bytes are our own.
    loaded: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=False)
    return loaded


class Checkpoints:
    """A folder of them. Rank 0 alone writes; all ranks read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._needed: list[str | None] = []  # by the newest checkpoint, and by the one before
        self._damaged = False

    def __bool__(self) -> bool:
        return any((self.folder / name).exists() for name in (LAST, PREVIOUS))

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a state so that a crash leaves the file as it was, or as it is to be. Raises StorageError."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                written = serialize(state)
                file.write(written)
                file.write(hashlib.sha256(written).digest())
                file.flush()
                os.fsync(file.fileno())
            if name == LAST and path.exists() and not self._damaged:
                os.replace(path, self.folder / PREVIOUS)
            os.replace(part, path)
            if os.name == "posix":  # the name, too, is only safe once its folder is
                folder = os.open(self.folder, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            if part.is_file():
                part.unlink()
            raise StorageError(
                f"{path} cannot be written: {error.strerror}. Nothing that was written before is lost: make room, and "
                "the same call goes on from the newest checkpoint"
            ) from error

    def save_last(self, state: dict[str, Any]) -> None:
        """Save the newest checkpoint, keep the one before it, and delete what neither needs: state["snapshot"] is the
        name of what it may go back to."""
        self.save(LAST, state)
        self._damaged = False
        self._needed = [state["snapshot"], *self._needed[:1]]
        for path in self.folder.glob("*"):
            if path.name not in (LAST, PREVIOUS, *self._needed):
                path.unlink()

    def load(self, name: str) -> dict[str, Any] | None:
        """None if there is no such file. Raises DamagedError."""
        path = self.folder / name
        if not path.exists():
            return None
        saved = path.read_bytes()
        if len(saved) < 32 or hashlib.sha256(saved[:-32]).digest() != saved[-32:]:
            raise DamagedError(f"{path} is damaged")
        return deserialize(saved[:-32])

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, None before the first. Raises TrainingError if none of them is."""
        damage = []
        for name in (LAST, PREVIOUS):
            try:
                state = self.load(name)
            except DamagedError as error:
                damage.append(str(error))
                continue
            if state is not None:
                if damage:
                    log.warning("%s: going on from %s, the checkpoint before it", damage[0], self.folder / name)
                self._damaged, self._needed = bool(damage), [state["snapshot"]]
                return state
        if damage:
            raise TrainingError(f"{', and '.join(damage)}: there is nothing to go on from; fresh=True begins again")
        return None
