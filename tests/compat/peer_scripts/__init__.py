"""Scripts as users of learn2learn and higher write them, and what runs them.

Every script ends with numbers in ``RESULT``, which depend on no random generator. Those in
golden.json come from learn2learn 0.2.0 and higher 0.2.1 themselves, in float64, by ``python -m
tests.compat.peer_scripts`` in the environment of ``make bench-env``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def run(name: str, ported: bool) -> list[float]:
    """The numbers of a script: with its imports changed, or as it stands, with the library."""
    source = (FOLDER / f"{name}.py").read_text()
    if ported:
        source = re.sub(
            r"^import higher$", "import fastmeta.compat.higher as higher", source, flags=re.M
        )
        source = re.sub(
            r"^(import|from) learn2learn\b", r"\1 fastmeta.compat.learn2learn", source, flags=re.M
        )
    namespace: dict = {"__name__": name}
    with float64():
        exec(compile(source, name, "exec"), namespace)
    return namespace["RESULT"]


def load_peer(name: str) -> None:
    """Import what a script needs of the real libraries; ImportError where it is missing.

    ``benchmarks.peers.fetch`` installs modules of learn2learn without the packages' own
    ``__init__``, whose names are added here.
    """
    if name.startswith("higher"):
        importlib.import_module("higher")
        return
    package = importlib.import_module("learn2learn.algorithms")
    utils = importlib.import_module("learn2learn.utils")
    maml = importlib.import_module("learn2learn.algorithms.maml")
    package.MAML = maml.MAML
    if "meta_sgd" in name:
        package.MetaSGD = importlib.import_module("learn2learn.algorithms.meta_sgd").MetaSGD
    top = importlib.import_module("learn2learn")
    for function in ("clone_module", "update_module", "detach_module"):
        setattr(top, function, getattr(utils, function))


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
