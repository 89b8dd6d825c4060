"""Errors for names of a library that its replacement does not have."""

from __future__ import annotations

from collections.abc import Mapping


def missing(package: str, name: str, instead: Mapping[str, str]) -> AttributeError:
    """Make the AttributeError for ``package.name``, with a hint what to use instead."""
    hint = instead.get(name)
    message = f"module {package!r} has no attribute {name!r}"
    return AttributeError(message if hint is None else f"{message}; {hint}")
