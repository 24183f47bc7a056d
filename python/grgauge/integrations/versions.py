"""The oldest version of a framework that its integration runs with."""

from __future__ import annotations

import re


def require_version(framework: str, version: str, oldest: tuple[int, ...]) -> None:
    """Raise ImportError where the installed version is older."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[: len(oldest)]) < oldest:
        raise ImportError(
            f"grgauge.integrations.{framework} needs {framework} {'.'.join(map(str, oldest))} or newer, not {version}"
        )
