"""Scripts on several processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def torchrun(world: int, script: Path, *arguments: str, limit: float = 600.0) -> str:
    """What a script writes when it runs on `world` processes of this machine, of one thread each, with our import path.

    Raises RuntimeError with it if a process fails, or if they take longer than `limit` seconds; then all are ended.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(script)]
    process = subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun then ends its processes
        output, _ = process.communicate()
        raise RuntimeError(f"{script.name} on {world} processes took more than {limit:.0f} s:\n{output}") from None
    if process.returncode:
        raise RuntimeError(f"{script.name} on {world} processes failed:\n{output}")
    return output
