"""Argument checks that every room shares. Errors read ``name: expected X, got Y``."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

_INTEGERS = (int, torch.SymInt)


def is_integer(value: object) -> bool:
    """Whether ``value`` is an int or a symbolic int of a traced graph; a bool is neither."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def check_integer(name: str, value: int, lowest: int) -> None:
    """TypeError if ``value`` is no int, ValueError if it is below ``lowest``."""
    if not is_integer(value):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < lowest:
        raise ValueError(f"{name}: expected at least {lowest}, got {value}")


def check_count(name: str, value: object, least: int, below: int | None = None) -> int:
    """``value`` as an int in [least, below); TypeError if it is none, ValueError out of range.

    Integers of other libraries, such as ``numpy.int64``, are converted.
    """
    expected = f"an integer >= {least}" + ("" if below is None else f" and < {below}")
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got the bool {value}")
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}"
        ) from None
    if count < least or (below is not None and count >= below):
        raise ValueError(f"{name}: expected {expected}, got {count}")
    return count


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(name: str, value: float) -> float:
    """``value`` as a float; TypeError if it is no number, ValueError if it is below 0 or NaN."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not value >= 0:  # NaN compares as false
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``; ValueError otherwise."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return value


def check_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_device(device: object, usable: bool = False) -> torch.device:
    """``device`` as a torch.device; ValueError if torch knows none like it.

    Args:
        device: a torch.device, or its name.
        usable: also raise if this machine lacks it.
    """
    try:
        found = torch.device(device)  # type: ignore[call-overload]
        if usable:
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        expected = "a device of this machine" if usable else "a device such as 'cpu' or 'cuda:0'"
        reason = f": {str(error).splitlines()[0]}" if usable else ""
        raise ValueError(f"device: expected {expected}, got {device!r}{reason}") from error
    return found


def check_dense(name: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor of one shape with a memory of its own."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a tensor of one shape, got a nested one; pad its examples, for "
            "instance with torch.nested.to_padded_tensor(x, 0), and let the module mask the padding"
        )
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {layout} one; use to_dense()")


def refuse_inference_mode(reason: str) -> None:
    """RuntimeError in inference mode, where autograd records nothing."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{reason}, which inference mode forbids; use torch.no_grad()")
