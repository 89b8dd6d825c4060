"""Encoders on fastmeta's own CPU kernels, as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmeta.engines.program.encoder import EncoderEngine

_PREFIX = "encoder."


class LoweredEncoder(nn.Module):
    """The result of :func:`lower`: an encoder, called by an engine of fastmeta.

    Parameters, buffers and training flag are the encoder's own, and so are the keys of
    ``state_dict()``: a checkpoint of one fits the other.

    Attributes:
        encoder: the module that was given.
    """

    encoder: nn.Module

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.training = encoder.training
        self._engine = EncoderEngine()
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, x: Tensor) -> Tensor:
        """The encoder's outputs ``[B, ...]`` for inputs ``[B, ...]``."""
        return self._engine(self.encoder, x)

    def explain(self, x: Tensor | None = None) -> str:
        """Say in a sentence whether calls on x run on fastmeta's kernels, and if not, why.

        Without x: whether there are examples on which they do.
        """
        return self._engine.explain(self.encoder, x)


def lower(encoder: nn.Module) -> LoweredEncoder:
    """An encoder whose forward and backward run on fastmeta's own CPU kernels.

    Convolutions of 3 x 3 take less than half of the multiplications (minimal filtering), and each
    pass is one compiled call: a training step of Conv4 takes about a third of the time that it
    takes in PyTorch, of ResNet-12 three fifths. Networks of ``Conv1d``, ``Conv2d``, ``Linear``,
    norms, activations, pools, flattening and sums are recognised. ``explain()`` names what is not.

    It computes what the encoder would: outputs and gradients to rounding, in parameters and inputs,
    running statistics updated in ``train()``, and second derivatives. Third derivatives raise an
    error. A call runs the encoder itself where the kernels would not do the same or are not there:
    layers that are not recognised, hooks, dropout in ``train()``, autocast, half precision, other
    devices than the CPU, ``torch.compile``, transforms of ``torch.func``, forward-mode derivatives.
    Hooks of its parameters run as ever.

    Learners do this by themselves, see ``ProtoNet``.

    Args:
        encoder: any module ``[B, ...] -> [B, ...]``. It may change later.

    Returns:
        A module with the encoder's own parameters, and with the keys of its ``state_dict()``.

    Raises:
        TypeError: ``encoder`` is no module.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> encoder = fm.lower(fm.models.Conv4(hidden=8, ways=None))
        >>> encoder(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 8])
        >>> fm.lower(torch.nn.LSTM(3, 4)).explain()
        'The encoder runs in PyTorch: model is a LSTM, which the program does not have yet.'
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected an nn.Module, got {type(encoder).__name__}")
    return encoder if isinstance(encoder, LoweredEncoder) else LoweredEncoder(encoder)


def _without_prefix(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Names the encoder's tensors as the encoder does."""
    for key in [key for key in state if key.startswith(prefix + _PREFIX)]:
        state[prefix + key.removeprefix(prefix + _PREFIX)] = state.pop(key)


def _with_prefix(_: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The inverse of ``_without_prefix``, before a state is loaded."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _PREFIX + key.removeprefix(prefix)] = state.pop(key)
