"""Install learn2learn's MAML and MetaSGD classes, and nothing else of it, in this environment.

    python -m benchmarks.peers.fetch

The package itself does not build on Python 3.11 or newer. Its source archive unpacks, and the
modules of the classes need two others of it; without the `__init__` of the packages that hold them
these are namespace packages, which import nothing.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

NAME, VERSION = "learn2learn", "0.2.0"
NEEDED = (
    "algorithms/maml.py",
    "algorithms/meta_sgd.py",
    "algorithms/base_learner.py",
    "utils/__init__.py",
    "_version.py",
)


def download(folder: Path) -> Path:
    """Download the source archive from pip's package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", NAME, "--dest", str(folder)]
    subprocess.run([*command, f"{NAME}=={VERSION}"], check=True)
    return next(folder.glob(f"{NAME}-*.tar.gz"))


def unpack(archive: Path, target: Path) -> list[Path]:
    """Write the needed modules and the licence below `target`/learn2learn; returns their paths."""
    top = PurePosixPath(f"{NAME}-{VERSION}")
    targets = {str(top / NAME / name): name for name in NEEDED} | {str(top / "LICENSE"): "LICENSE"}
    written = []
    with tarfile.open(archive) as content:
        for member, name in targets.items():
            path = target / NAME / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.extractfile(member).read())
            written.append(path)
    return written


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in unpack(download(Path(folder)), Path(sysconfig.get_path("purelib"))):
            print(path)


if __name__ == "__main__":
    main()
