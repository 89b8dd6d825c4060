"""Errors of a module's forward, told by the argument, the layer and what came."""

from __future__ import annotations

import traceback

from torch import nn

from fastmeta.core.trees import Tree, named_tensors

# Of a forward that cannot take its input. An error keeps its kind.
KINDS = (IndexError, ValueError, TypeError, RuntimeError)
_LONGEST = 90  # characters of a layer's description

# Words of an error, and the way out.
_WAYS_OUT = {
    "more than 1 value per channel": (
        "norm layers take the statistics of one task's examples, and a single example has none; "
        "norm_statistics='running' takes the running statistics after eval()"
    ),
}


def described(error: Exception, module: nn.Module, name: str, x: Tree) -> Exception:
    """An error of ``module(x)`` of the same kind, which names argument, shape and layer.

    An exception of another class than Python's own is returned unchanged: somebody may catch it.

    Args:
        error: raised by the module's forward.
        module: the module.
        name: of the argument.
        x: what the module got: examples of one task, or of all; a tensor or a tree.
    """
    kind = type(error)
    if kind not in KINDS:
        return error
    sentence = " ".join(str(error).split()).rstrip(".")
    ways = [way for words, way in _WAYS_OUT.items() if words in sentence]
    way = f". {ways[0][0].upper()}{ways[0][1:]}" if ways else ""
    # Of a tree each tensor, by its place: ['ids'] torch.int64 of shape [5, 7], ...
    got = ", ".join(
        f"{path} {tensor.dtype} of shape {list(tensor.shape)}".strip()
        for path, tensor in named_tensors("", x).items()
    )
    return kind(
        f"{name}: {type(module).__name__} fails on {got}"
        f"{_layer_at_fault(module, error)}: {sentence}{way}"
    )


def _layer_at_fault(module: nn.Module, error: Exception) -> str:
    """The innermost layer in whose forward an error was raised; empty for the module itself."""
    names = {id(m): name for name, m in module.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        name = names.get(id(owner), "")
        if name:
            what = " ".join(repr(owner).split())
            found = f" in {name}, {what if len(what) <= _LONGEST else type(owner).__name__}"
    return found
