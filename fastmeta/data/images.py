"""Labelled images in one uint8 tensor, from which an episode is gathered in one operation."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmeta.core.checks import check_count
from fastmeta.data.class_examples import ClassExamples

_Self = TypeVar("_Self", bound="ClassImages")


class ClassImages(ClassExamples):
    """C classes of images. Base of the image sources; takes your own images too.

    Args:
        images: uint8, on any device: [C, E, channels, H, W], E of each class; or, with ``counts``,
            [M, channels, H, W], class by class.
        class_names: C names, or None for "0", "1", ...
        counts: number of images of each class, with the sum M; None: E of each.

    The images of an episode are float32 in [0, 1].

    Attributes:
        class_names: list of C strings.

    Raises:
        TypeError: ``images`` is not a uint8 tensor.
        ValueError: ``images`` has other dimensions, the counts do not sum to M, or the
            number of names is not C.

    Example::

        >>> import torch
        >>> from fastmeta.data import ClassImages, Episodes
        >>> source = ClassImages(torch.randint(256, (10, 6, 3, 8, 8), dtype=torch.uint8))
        >>> Episodes(source, ways=5, shots=1, queries=2, tasks=3)[0].query_x.shape
        torch.Size([3, 10, 3, 8, 8])
    """

    def __init__(
        self,
        images: Tensor,
        class_names: Sequence[str] | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a uint8 tensor, got {came}")
        if images.ndim != (5 if counts is None else 4):
            wanted = "[C, E, channels, H, W]" if counts is None else "[M, channels, H, W]"
            raise ValueError(f"images: expected {wanted}, got shape {tuple(images.shape)}")
        if counts is None:
            counts = [images.shape[1]] * images.shape[0]
            images = images.flatten(0, 1)
        counts = [check_count("counts", count, least=0) for count in counts]
        if sum(counts) != len(images):
            raise ValueError(f"counts: expected the sum {len(images)}, got {sum(counts)}")
        names = list(map(str, range(len(counts))) if class_names is None else class_names)
        if len(names) != len(counts):
            raise ValueError(f"class_names: expected {len(counts)} names, got {len(names)}")
        super().__init__(np.arange(len(images)), np.array(counts, dtype=np.int64), names)
        self._images = images.contiguous()
        self._files: list[str] | None = None

    @property
    def images(self) -> Tensor:
        """All images: uint8 [C, E, channels, H, W].

        Raises:
            ValueError: the classes have different numbers of images; :attr:`flat` has them.
        """
        if len(set(self.counts)) > 1:
            raise ValueError(
                f"images: expected equally many of each class, got {min(self.counts)} to "
                f"{max(self.counts)}; flat has them, [M, channels, H, W], class by class"
            )
        return self._images.view(self.num_classes, self.num_examples, *self._images.shape[1:])

    @property
    def flat(self) -> Tensor:
        """All images, class by class: uint8 [M, channels, H, W]."""
        return self._images

    def subset(self: _Self, classes: Sequence[int]) -> _Self:
        """Source of the classes with these numbers, in this order, and of no others."""
        part = super().subset(classes)
        rows = part._rows
        part._images = self._images[torch.from_numpy(rows).to(self._images.device)]
        part._files = self._files and [self._files[row] for row in rows]
        part._rows = np.arange(len(rows))
        return part

    def to(self: _Self, device: str | torch.device) -> _Self:
        """Source with the same images on ``device``."""
        moved = copy.copy(self)
        moved._images = self._images.to(device)
        return moved

    def _example_name(self, row: int) -> str:
        return self._files[row] if self._files else super()._example_name(row)

    def _inputs(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        chosen = torch.from_numpy(rows).to(self._images.device)
        # Division rounds differently on CPU and CUDA; this product does not, and maps 255 to 1.
        return self._images.index_select(0, chosen).to(torch.float32).mul_(1 / 255)


def stable_fraction(name: str, salt: str) -> float:
    """Number in [0, 1) that depends only on the two strings: fixed splits on every machine."""
    digest = hashlib.sha256(f"{salt}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
