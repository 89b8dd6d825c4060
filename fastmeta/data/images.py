"""Labelled images held whole as one uint8 tensor, from which episodes are gathered in one go."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmeta.core.checks import check_count
from fastmeta.data.episodes import Episode


class ClassImages:
    """C classes of E images each; the base of the image sources, usable with images of your own.

    Args:
        images: uint8 [C, E, channels, H, W], on any device.
        class_names: C names, or None for "0", "1", ...

    Attributes:
        images: the tensor given, contiguous.
        class_names: list of C strings.

    Raises:
        TypeError: ``images`` is not a uint8 tensor.
        ValueError: ``images`` has not five dimensions, or the number of names differs from C.

    Example::

        >>> import torch
        >>> from fastmeta.data import ClassImages, Episodes
        >>> source = ClassImages(torch.randint(256, (10, 6, 3, 8, 8), dtype=torch.uint8))
        >>> Episodes(source, ways=5, shots=1, queries=2, tasks=3)[0].query_x.shape
        torch.Size([3, 10, 3, 8, 8])
    """

    def __init__(self, images: Tensor, class_names: Sequence[str] | None = None) -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a uint8 tensor, got {came}")
        if images.ndim != 5:
            raise ValueError(
                f"images: expected [C, E, channels, H, W], got shape {tuple(images.shape)}"
            )
        names = map(str, range(len(images))) if class_names is None else class_names
        self.images = images.contiguous()
        self.class_names = list(names)
        if len(self.class_names) != len(images):
            raise ValueError(
                f"class_names: expected {len(images)} names, got {len(self.class_names)}"
            )

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.images.shape[0]

    @property
    def num_examples(self) -> int:
        """E, the number of images a class."""
        return self.images.shape[1]

    def to(self, device: str | torch.device) -> ClassImages:
        """This source with its images on ``device``."""
        moved = copy.copy(self)
        moved.images = self.images.to(device)
        return moved

    def check(self, ways: int, shots: int, queries: int) -> None:
        """Raise ValueError where there are too few classes, or too few images in each."""
        ways = check_count("ways", ways, least=1)
        shots = check_count("shots", shots, least=1)
        queries = check_count("queries", queries, least=0)
        if ways > self.num_classes:
            raise ValueError(
                f"ways: expected at most the {self.num_classes} classes of the source, got {ways}"
            )
        if shots + queries > self.num_examples:
            raise ValueError(
                f"shots + queries: expected at most the {self.num_examples} examples of a class, "
                f"got {shots} + {queries}"
            )

    def sample(
        self, rng: np.random.Generator, tasks: int, ways: int, shots: int, queries: int
    ) -> Episode:
        """Draw T tasks of N classes, with as many support and query images of each as asked.

        A task's classes differ, come in random order, and are labelled 0..N-1 in that order; its
        support and query images differ. Images are float32 in [0, 1], labels int64, class-major.

        Returns:
            Episode with x [T, N * shots, channels, H, W] and [T, N * queries, channels, H, W].

        Raises:
            ValueError: as :meth:`check`; or ``tasks`` is negative.
        """
        self.check(ways, shots, queries)
        tasks = check_count("tasks", tasks, least=0)
        classes = draw_distinct(rng, (tasks,), self.num_classes, ways)
        examples = draw_distinct(rng, (tasks, ways), self.num_examples, shots + queries)
        rows = torch.from_numpy(classes[..., None] * self.num_examples + examples)
        rows = rows.to(self.images.device)
        support_x, support_y = self._gather(rows[:, :, :shots])
        query_x, query_y = self._gather(rows[:, :, shots:])
        return Episode(support_x, support_y, query_x, query_y)

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        tasks, ways, each = rows.shape
        flat = self.images.flatten(0, 1)
        # A division by 255 rounds differently on CPU and CUDA; this product does not, and 255 -> 1.
        x = flat.index_select(0, rows.reshape(-1)).to(torch.float32).mul_(1 / 255)
        labels = torch.arange(ways, device=rows.device).repeat_interleave(each)
        return (
            x.view(tasks, ways * each, *flat.shape[1:]),
            labels.expand(tasks, ways * each).contiguous(),
        )


def draw_distinct(
    rng: np.random.Generator, shape: tuple[int, ...], population: int, draws: int
) -> np.ndarray:
    """For each entry of ``shape``, ``draws`` distinct indices below ``population`` in random order.

    Every index gets a random 64-bit key and the smallest keys win. The index itself is the key's
    low bits, so that keys never tie and a partition of values, faster than one of positions, is
    enough.

    Returns:
        int64 array of shape [*shape, draws]; uniform over ordered draws.
    """
    mask = np.uint64((1 << (population - 1).bit_length()) - 1)
    keys = rng.integers(1 << 64, size=(*shape, population), dtype=np.uint64)
    keys &= ~mask
    keys |= np.arange(population, dtype=np.uint64)
    chosen = np.partition(keys, draws - 1, axis=-1)[..., :draws]
    chosen.sort(axis=-1)
    return (chosen & mask).astype(np.int64)


def stable_fraction(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on the two strings alone: fixed splits on every machine."""
    digest = hashlib.sha256(f"{salt}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
