"""Choice between the compiled implementation of an op and plain PyTorch.

``FASTMETA_BACKEND=native|torch`` (read at every call) or ``use_backend`` force the choice. Without
either, native kernels run if they exist.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.checks import check_choice


def _compiled_with(file: str) -> str:
    """The torch version an extension was compiled with; empty if unknown."""
    # Read from the file: loading an extension of another torch may crash.
    mark = b"fastmeta compiled with torch "
    with open(file, "rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        at = content.find(mark)
        return "" if at < 0 else content[at + len(mark) : content.find(b"\0", at)].decode()


def _why_missing(package: Path) -> str:
    """Why ``package`` has no extension."""
    # In the folder of the sources, Python imports them and not the package installed from them.
    if (package.parent / "setup.py").exists():
        return (
            f"it is imported from its sources in {package.parent}, where nothing is compiled; "
            "start Python in another folder, or install it with pip's --editable"
        )
    return "it was installed without the compiled extension"


def _load() -> tuple[Any, str]:
    """The extension, or None and the reason why it cannot be used."""
    spec = find_spec("fastmeta._C")
    if spec is None or spec.origin is None:
        return None, _why_missing(Path(__file__).parents[1])
    compiled, running = _compiled_with(spec.origin), torch.__version__
    # libtorch's C++ ABI changes between minor versions: an extension that loads may crash later.
    if compiled and compiled.split(".")[:2] != running.split(".")[:2]:
        return None, (
            f"it was compiled with torch {compiled}, and this is torch {running}; "
            "install fastmeta again from its sources, with pip install --no-build-isolation"
        )
    try:
        return import_module("fastmeta._C"), ""
    except ImportError as error:
        return None, str(error)


_C, UNAVAILABLE = _load()

OPS = (
    "inner_update",
    "prototypes",
    "pairwise_distance",
    "prototype_loss",
    "matching_loss",
    "linear_head",
)

NEAREST = "nearest"

CONVOLUTION = "task_conv2d"

BATCH_NORM = "task_batch_norm"

ACTIVATION = "activation"

PAIRS = ("pair_scores", "pair_pool")

RIDGE = "ridge_head"

PROGRAM = "task_program"

# Kernels of CPUs only. Other devices run a composition of ops instead.
PRODUCT: str = "task_product"

HEAD_LOSS: str = "linear_head_loss"

ENCODER: str = "encode"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

WIDE_DTYPES = (torch.float32, torch.float64)

BACKENDS = ("native", "torch")


def _has_kernel(op: str, device: str) -> bool:
    """Whether an op was compiled for a device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    # The task program is several ops, built together.
    name = "task_program_meta_gradient" if op == PROGRAM else op
    return _C is not None and has(f"fastmeta::{name}", device.upper())


# torch.compile traces the code below, and guards on its globals: plain tables and strings.
NAMES = (*OPS, NEAREST, CONVOLUTION, BATCH_NORM, ACTIVATION, *PAIRS, RIDGE, PROGRAM)

# Their kernels take no half types.
WIDE_OPS = (BATCH_NORM, ACTIVATION, RIDGE, PROGRAM, PRODUCT, ENCODER)

KERNELS = {
    (op, device): WIDE_DTYPES if op in WIDE_OPS else DTYPES
    for op in (*NAMES, PRODUCT, HEAD_LOSS, ENCODER)
    for device in ("cpu", "cuda")
    if _has_kernel(op, device)
}

_override: str | None = None


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force "native" or "torch" for the ops called inside a ``with`` block, on every thread.

    Overrides the environment variable FASTMETA_BACKEND. Raises ValueError for another name.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.randn(4, 3), torch.randn(5, 3)
        >>> with fm.use_backend("torch"):
        ...     distance = fm.pairwise_distance(x, y)
    """
    global _override
    before, _override = _override, check_choice("backend", backend, BACKENDS)
    try:
        yield
    finally:
        _override = before


def _selected() -> str | None:
    """The backend that the context or the environment asks for, if any."""
    value = _override or os.environ.get("FASTMETA_BACKEND")
    return check_choice("FASTMETA_BACKEND", value, BACKENDS) if value else None


def is_free() -> bool:
    """Whether neither the context nor the environment asks for a backend."""
    return _override is None and not os.environ.get("FASTMETA_BACKEND")


def _missing(op: str, device: str, dtype: torch.dtype) -> str:
    """Why there is no native kernel; empty if there is one."""
    if _C is None:
        return f"the native extension is missing: {UNAVAILABLE}"
    if (op, device) not in KERNELS:
        return f"the extension was built without {op} for {device}"
    if dtype not in KERNELS[op, device]:
        return f"{op} has no native kernel for {dtype} on {device}"
    return ""


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"fastmeta runs in plain PyTorch: {reason}. Set FASTMETA_BACKEND=torch to accept that.",
        RuntimeWarning,
        stacklevel=4,
    )


def _select(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend, and the reason for plain PyTorch if nothing asked for it."""
    requested = _selected()
    reason = "" if requested == "torch" else _missing(op, device, dtype)
    return ("torch" if requested == "torch" or reason else "native"), reason


def is_available(op: str, x: Tensor) -> bool:
    """Whether the kernel of an optional ``op`` is built for ``x``, and not disabled.

    No warning if not: a composition of other ops takes its place.
    """
    built = x.dtype in KERNELS.get((op, x.device.type), ())
    return built and _selected() != "torch"


def is_native(op: str, x: Tensor) -> bool:
    """Whether ``op`` on ``x`` runs its native kernel; warns once if an expected one is missing."""
    backend, reason = _select(op, x.device.type, x.dtype)
    if reason and not torch.compiler.is_compiling():
        _warn(reason)
    return backend == "native"


def backend_of(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """The implementation that ``op`` runs: "native" or "torch".

    Args:
        op: "inner_update", "prototypes", "pairwise_distance", "nearest", "prototype_loss",
            "matching_loss", "linear_head", "task_conv2d", "task_batch_norm", "activation",
            "pair_scores", "pair_pool", "ridge_head" or "task_program".
        device: the tensors' device or its name.
        dtype: the tensors' dtype.

    Raises:
        ValueError: unknown op, or FASTMETA_BACKEND is neither "native" nor "torch".

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> fm.backend_of("prototype_loss", "cpu", torch.float32)
        'native'
    """
    check_choice("op", op, NAMES)
    return _select(op, torch.device(device).type, dtype)[0]


def build_info() -> dict[str, Any]:
    """Facts about the extension: ``native`` (bool), and compiler, torch, isa, cuda or ``reason``.

    Example:
        >>> import fastmeta as fm
        >>> fm.build_info()["native"]
        True
    """
    if _C is None:
        return {"native": False, "reason": UNAVAILABLE}
    return {"native": True, **_C.build_info()}
