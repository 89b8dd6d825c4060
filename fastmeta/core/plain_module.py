"""The plain module behind one that a compiler of PyTorch has made."""

from __future__ import annotations

import torch
from torch import nn

_COMPILED = "OptimizedModule"  # by name: to import the class would load the compiler


def plain_module(name: str, module: nn.Module) -> nn.Module:
    """The module whose parameters are adapted: of ``torch.compile(m)`` it is ``m``.

    Args:
        name: the argument's name for errors.
        module: any module.

    Raises:
        TypeError: no module; or the module or a part of it is scripted or traced, or a part of it
            is compiled: it cannot be watched as it runs, nor copied.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    if _is_compiled(module):
        module = module._orig_mod  # type: ignore[assignment]
    for path, m in module.named_modules():
        where = f"{name}.{path}" if path else name
        if isinstance(m, torch.jit.ScriptModule):
            raise TypeError(
                f"{where}: expected a plain nn.Module, got a {type(m).__name__}, which cannot be "
                "copied; give the module that it was made from"
            )
        if _is_compiled(m):
            raise TypeError(
                f"{where}: expected a plain nn.Module, got the result of torch.compile; give "
                f"{where}._orig_mod, the module that it was made from"
            )
    return module


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == _COMPILED and hasattr(module, "_orig_mod")
