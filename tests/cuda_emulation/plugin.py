"""Makes a pytest process emulate: fastmeta's extension is the emulated one, for CPU tensors."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import zlib
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD
from tests.cuda_emulation.mutants import Hunter, all_mutants
from tests.cuda_emulation.records import Recorder
from tests.cuda_emulation.settings import Settings

SETTINGS = Settings.from_environment()


def load_extension() -> None:
    """Puts the emulated _C where fastmeta looks for its own."""
    path = BUILD / "_C.so"
    emulator.load_kernels(path)
    loader = importlib.machinery.ExtensionFileLoader("fastmeta._C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fastmeta._C", loader))
    loader.exec_module(module)
    sys.modules["fastmeta._C"] = module


def pytest_configure(config) -> None:
    torch.use_deterministic_algorithms(True)  # which fills new tensors, so workspaces, with NaN
    if SETTINGS.mutants:
        mutants = all_mutants()[SETTINGS.shard :: SETTINGS.shards]
        config.pluginmanager.register(Hunter(mutants, Path(SETTINGS.records), SETTINGS.is_partial))
    if SETTINGS.records:
        config.pluginmanager.register(Recorder(Path(SETTINGS.records) / SETTINGS.name))


def parameter(item, name: str):
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(name) if callspec else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Keeps this process's share of the tests. The torch backend runs no kernel."""
    items[:] = [item for item in items if parameter(item, "backend") != "torch"]
    if SETTINGS.mutants:
        return
    included = [item for item in items if SETTINGS.includes(item.nodeid)]
    items[:] = included[SETTINGS.shard :: SETTINGS.shards]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    order = item.stash.get(emulator.ORDER_OF, None) or SETTINGS.order_of(item.nodeid)
    emulator.set_order(order, zlib.crc32(item.nodeid.encode()))
    item.user_properties.append(("order", order))
    item.add_report_section("setup", "emulator", f"{order} order of threads")


load_extension()
