"""Makes the package's docstrings what mkdocstrings reads: Google's sections, in Markdown."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import griffe

from fastmeta.cli.options import option_help
from fastmeta.training.config import TrainConfig

_EXAMPLE = re.compile(r"^Example::?$", re.MULTILINE)
_DOCTEST = re.compile(r"(?<=\n\n)>>> .*\Z", re.DOTALL)
_SHARED = re.compile(r"^    (\w+(?:, \w+)+)(:.*(?:\n      .*)*)", re.MULTILINE)
_OPTIONS = {
    f"{TrainConfig.__module__}.{TrainConfig.__name__}.{option.name}": option_help(option)
    for option in dataclasses.fields(TrainConfig)
}
_ROLE = re.compile(r":(?:class|func|meth|mod):`([\w.]+)`")


def as_markdown(text: str) -> str:
    """A docstring as the parser wants it.

    Examples are a section, also the bare one that an op's docstring ends with; arguments that share
    a line get it each; a Sphinx role is a reference.

    Args:
        text: the docstring, without indentation.
    """

    text = _EXAMPLE.sub("Examples:", text)
    text = _DOCTEST.sub(lambda found: "Examples:\n" + _indented(found[0]), text)
    text = _SHARED.sub(_each, text)
    return _ROLE.sub(_reference, text)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _each(found: re.Match[str]) -> str:
    names, description = found.groups()
    if names.startswith(("TypeError", "ValueError")):
        return found[0]
    return "\n".join(f"    {name}{description}" for name in names.split(", "))


def _reference(found: re.Match[str]) -> str:
    """A link if the site has the object, else only its name."""
    path, name = found[1], found[1].rpartition(".")[2]
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


class Docstrings(griffe.Extension):
    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Document an option of a training run by its ``--help``."""
        if attr.path in _OPTIONS:
            attr.docstring = griffe.Docstring(_OPTIONS[attr.path], parent=attr)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
