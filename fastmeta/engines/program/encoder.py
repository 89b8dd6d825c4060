"""Encoders on fastmeta's own kernels where these compute what the encoder would."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastmeta.core import backend
from fastmeta.core.plain_module import plain_module
from fastmeta.engines.autograd import TURN
from fastmeta.engines.program.encoder_call import encode
from fastmeta.engines.program.encoder_lowering import OWN, EncoderLowering, EncoderProgram
from fastmeta.engines.program.trace import LoweringError

_LOWERINGS_KEPT = 4  # states of an encoder, such as train() and eval()
_PLAIN = (Tensor, nn.Parameter)  # exact types: a subclass may have no memory of its own


class EncoderEngine:
    """Calls an encoder: its program if it has one, else the encoder itself.

    Copies and pickles of an engine are empty: a copied encoder is another module.

    Args:
        norm_statistics: as in ``EncoderLowering``.

    Example:
        >>> engine, encoder = EncoderEngine(), nn.Conv2d(1, 2, 3)
        >>> engine(encoder, torch.zeros(4, 1, 5, 5)).shape
        torch.Size([4, 2, 3, 3])
    """

    def __init__(self, norm_statistics: str = OWN) -> None:
        self._norm_statistics = norm_statistics
        self._lowerings: list[EncoderLowering] = []

    def __reduce__(self) -> tuple[type[EncoderEngine], tuple[str]]:
        return EncoderEngine, (self._norm_statistics,)

    def __call__(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """The encoder's outputs ``[B, ...]`` for x ``[B, ...]``; errors are the encoder's own."""
        if _is_traced():
            return cast("Tensor", encoder(x))
        program = self.program(encoder, x)
        if isinstance(program, str):
            return cast("Tensor", encoder(x))
        return encode(program, x.unsqueeze(0)).squeeze(0)

    def program(self, encoder: nn.Module, x: Tensor, lead: int = 1) -> EncoderProgram | str:
        """The program of the encoder's outputs for x, or the reason why there is none.

        ``lead`` is the number of dimensions in front of an example's.
        """
        reason = _why_not(x, lead)
        if reason:
            return reason
        with TURN:  # a trace changes switches of Python, and looks at the encoder
            try:
                program = self._lowering(encoder).program(tuple(x.shape[lead:]))
            except LoweringError as error:
                return error.reason
        if isinstance(program, str):
            return program
        if (x.dtype, x.device) != (program.dtype, program.device):
            return f"x is {x.dtype}, and the parameters are {program.dtype}"
        if x.shape[lead - 1] < program.least_examples:
            return "a norm has one value a channel"
        return program

    def explain(self, encoder: nn.Module, x: Tensor | None = None) -> str:
        """Say in a sentence how calls on x compute, or on examples that fit; and why."""
        program: EncoderProgram | str
        if x is not None:
            program = self.program(encoder, x)
        elif not backend.is_available(backend.ENCODER, next(encoder.parameters(), torch.empty(0))):
            program = "there are no kernels for its parameters, or the torch backend was asked for"
        else:
            try:
                with TURN:
                    program = self._lowering(encoder).fitting()
            except LoweringError as error:
                program = error.reason
        if isinstance(program, str):
            return f"The encoder runs in PyTorch: {program}."
        return f"The encoder runs on fastmeta's CPU kernels: {', '.join(program.layers)}."

    def _lowering(self, encoder: nn.Module) -> EncoderLowering:
        for place, lowering in enumerate(self._lowerings):
            if lowering.encoder is encoder and lowering.is_current():
                # The latest first: a training loop finds it at once.
                self._lowerings.insert(0, self._lowerings.pop(place))
                return lowering
        _check(encoder)
        lowering = EncoderLowering(encoder, self._norm_statistics)
        self._lowerings = [lowering, *self._lowerings[: _LOWERINGS_KEPT - 1]]
        return lowering


def check_lower(lower: str | bool) -> str | bool:
    """``lower``; ValueError unless it is ``"auto"`` or ``False``."""
    if lower is not False and lower != "auto":
        raise ValueError(f"lower: expected 'auto' or False, got {lower!r}")
    return lower


def _is_traced() -> bool:
    """Whether something records or transforms the encoder's own operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _why_not(x: Tensor, lead: int) -> str:
    """The reason why no program takes x here; empty if one may."""
    if type(x) not in _PLAIN or x.layout is not torch.strided or x.is_nested:
        return "x is no plain tensor"
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, where the encoder runs in PyTorch"
    if _is_traced():
        return "something traces or transforms the call"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, and the program computes in the parameters' dtype"
    if not backend.is_available(backend.ENCODER, x):
        return f"there are no kernels for {x.dtype}, or the torch backend was asked for"
    if x.ndim < lead or 0 in x.shape[:lead]:
        return "there are no examples"
    return ""


def _check(encoder: nn.Module) -> None:
    """Raise LoweringError for modules that a trace should not see."""
    try:
        if plain_module("encoder", encoder) is encoder:
            # Replaced for a call, as by torch.func.functional_call: nothing to keep.
            for name, p in encoder.named_parameters():
                if type(p) is not nn.Parameter:
                    raise LoweringError(f"parameter {name!r} is a {type(p).__name__}")
            return
    except TypeError as error:
        raise LoweringError(str(error)) from error
    raise LoweringError("it is the result of torch.compile")
