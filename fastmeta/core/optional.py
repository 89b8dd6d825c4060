"""Optional dependencies, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str, package: str = "fastmeta[train]") -> ModuleType:
    """Import ``module``; an ImportError names ``purpose`` and the ``package`` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module}: pip install {package}") from error
