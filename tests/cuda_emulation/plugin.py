"""Makes a pytest process emulate: fastmeta's extension is the emulated one, for CPU tensors."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import torch

from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD


def load_extension() -> None:
    """Puts the emulated _C where fastmeta looks for its own."""
    path = BUILD / "_C.so"
    if emulator.MUTANT in os.environ:
        emulator.load_kernels(Path(os.environ[emulator.MUTANT]))
    emulator.load_kernels(path)
    loader = importlib.machinery.ExtensionFileLoader("fastmeta._C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fastmeta._C", loader))
    loader.exec_module(module)
    sys.modules["fastmeta._C"] = module


def pytest_configure(config) -> None:
    torch.use_deterministic_algorithms(True)  # which fills new tensors, so workspaces, with NaN
    emulator.set_order(os.environ[emulator.ORDER])


def parameter(item, name: str):
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(name) if callspec else None


def pytest_collection_modifyitems(config, items) -> None:
    """The torch backend runs no kernel."""
    items[:] = [item for item in items if parameter(item, "backend") != "torch"]


load_extension()
