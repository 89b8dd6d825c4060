"""The code of a task program: a tensor that Python writes and C++ reads.

An int64 tensor ``[16 + V + 24 N]`` on the CPU;
csrc/task_program/program/program.h reads the same format.

    header  format, V values, N instructions, P parameters, F frozen ones, output value,
            loss kind (-1: none), its a and b, mean (1) or sum (0), scale of the loss, first step,
            S shared parameters
    values  elements of one example, V words; value 0 is the input
    then N instructions of 24 words
            opcode, x, x2, y (values; -1: none), weight, bias, arguments

``weight`` and ``bias`` are offsets in the arena [P] from 0 up, offsets ``-2 - i`` in the frozen
parameters [F], or -1 for none. Real numbers are float64, stored by their bits.

The last S parameters of the arena are learned and not adapted. Steps leave them unchanged, so step
sizes, vectors and theta_K have ``P - S`` elements, the adapted ones; gradients have P.

A norm's weight and bias are [rows, C]. Passes at the given parameters read the row of the first
step. Passes after k inner steps read the k-th row behind it, or the last row if there are fewer.

Images are channels-last in convolution, norm and pool: an example is [H, W, C]. One dimension is
an image of height 1. The weight of a convolution is [O, C / groups, kh, kw] as in PyTorch.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

_FORMAT = 3


_HEADER, _INSTRUCTION = 16, 24  # words

_NONE = -1

_FIRST_STEP, _SHARED = 11, 12  # their words in the header


class Opcode(IntEnum):
    LINEAR = 0  # y = x W' + b on the last dimension; inputs, outputs
    ACTIVATION = 1  # kind, a, b
    ADD = 2  # y = x + x2
    LAYER_NORM = 3  # normalised elements, eps
    CONVOLUTION = 4  # C, O, H, W, kernel, stride, padding, dilation (each: height, width), groups
    NORM = 5  # C, groups (0: batch norm), eps, given mean and variance (-1: the batch's), rows
    POOL = 6  # kind, C, H, W, kernel, stride, padding, whether an average counts the padding
    TRANSPOSE = 7  # rows, columns: each example becomes [columns, rows]


class PoolKind(IntEnum):
    MAX = 0
    AVERAGE = 1


class LossKind(IntEnum):
    CROSS_ENTROPY = 0  # a: label smoothing, b: ignored label
    MSE = 1
    BCE_WITH_LOGITS = 2
    HUBER = 3  # a: delta
    L1 = 4


# How the arguments are packed into words: q an integer, d a float64.
_ARGUMENTS = {
    Opcode.LINEAR: "<qq",
    Opcode.ACTIVATION: "<qdd",
    Opcode.ADD: "<",
    Opcode.LAYER_NORM: "<qd",
    Opcode.CONVOLUTION: "<13q",
    Opcode.NORM: "<qqdqqq",
    Opcode.POOL: "<11q",
    Opcode.TRANSPOSE: "<qq",
}


@dataclass(frozen=True)
class Instruction:
    """One instruction; x, x2, y index values, weight and bias are offsets (see above)."""

    opcode: Opcode
    x: int
    y: int
    x2: int = _NONE
    weight: int = _NONE
    bias: int = _NONE
    args: tuple[Any, ...] = ()

    def words(self) -> list[int]:
        args = _words(_ARGUMENTS[self.opcode], self.args, _INSTRUCTION - 6)
        return [self.opcode, self.x, self.x2, self.y, self.weight, self.bias, *args]

    @classmethod
    def of(cls, words: list[int]) -> Instruction:
        opcode = Opcode(words[0])
        x, x2, y, weight, bias = words[1:6]
        return cls(opcode, x, y, x2, weight, bias, _numbers(_ARGUMENTS[opcode], words[6:]))


@dataclass(frozen=True)
class LossCode:
    """The loss of a task: ``scale`` times the mean or the sum over its examples."""

    kind: LossKind
    a: float = 0.0
    b: int = 0
    mean: bool = True
    scale: float = 1.0

    def words(self) -> list[int]:
        return [self.kind, *_words("<dqqd", (self.a, self.b, self.mean, self.scale), 4)]

    @classmethod
    def of(cls, words: list[int]) -> LossCode | None:
        if words[0] == _NONE:
            return None
        a, b, mean, scale = _numbers("<dqqd", words[1:])
        return cls(LossKind(words[0]), a, b, bool(mean), scale)


@dataclass(frozen=True)
class Code:
    """A decoded code tensor.

    Attributes:
        values: for each value, the number of elements of one example.
        instructions: in the order in which they run.
        parameters, frozen, shared: P, F, S.
        output: index of the value that the module returns.
        loss: None for a program that gives outputs only.
        first_step: inner steps taken before, which selects a norm's row.
    """

    values: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    parameters: int
    frozen: int
    output: int
    loss: LossCode | None = None
    first_step: int = 0
    shared: int = 0

    @property
    def adapted(self) -> int:
        """Number of elements of the adapted parameters, P - S."""
        return self.parameters - self.shared

    @property
    def has_batch_norm(self) -> bool:
        """Whether a norm takes statistics of the batch, of which no example may be absent."""
        norms = (i.args for i in self.instructions if i.opcode == Opcode.NORM)
        return any(groups == 0 and mean == _NONE for _, groups, _, mean, *_ in norms)

    def encode(self) -> Tensor:
        counts = [len(self.values), len(self.instructions), self.parameters, self.frozen]
        loss = self.loss.words() if self.loss else [_NONE, 0, 0, 0, 0]
        header = [_FORMAT, *counts, self.output, *loss, self.first_step, self.shared]
        header += [0] * (_HEADER - len(header))
        body = [word for instruction in self.instructions for word in instruction.words()]
        return torch.tensor([*header, *self.values, *body])

    @classmethod
    def decode(cls, code: Tensor) -> Code:
        words = code.tolist()
        _, values, count, parameters, frozen, output = words[:6]
        start = _HEADER + values
        starts = range(start, start + count * _INSTRUCTION, _INSTRUCTION)
        instructions = (Instruction.of(words[i : i + _INSTRUCTION]) for i in starts)
        return cls(
            values=tuple(words[_HEADER:start]),
            instructions=tuple(instructions),
            parameters=parameters,
            frozen=frozen,
            output=output,
            loss=LossCode.of(words[6:_FIRST_STEP]),
            first_step=words[_FIRST_STEP],
            shared=words[_SHARED],
        )


def at_step(code: Tensor, step: int) -> Tensor:
    """The code for parameters that are given after ``step`` inner steps."""
    code = code.clone()
    code[_FIRST_STEP] = step
    return code


def _words(layout: str, numbers: tuple[int | float, ...], count: int) -> list[int]:
    packed = struct.pack(layout, *numbers).ljust(8 * count, b"\0")
    return list(struct.unpack(f"<{count}q", packed))


def _numbers(layout: str, words: list[int]) -> tuple[Any, ...]:
    packed = struct.pack(f"<{len(words)}q", *words)
    return struct.unpack_from(layout, packed)
