"""Errors of a stand-in for names that it does not have."""

from __future__ import annotations

from collections.abc import Mapping


def missing(package: str, name: str, instead: Mapping[str, str]) -> AttributeError:
    """The error for ``package.name``, with what to use instead."""
    hint = instead.get(name)
    message = f"module {package!r} has no attribute {name!r}"
    return AttributeError(message if hint is None else f"{message}; {hint}")
