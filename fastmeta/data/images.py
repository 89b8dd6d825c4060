"""Labelled images in one uint8 tensor, from which an episode is gathered in one operation."""

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
    """C classes of E images each. Base of the image sources; takes your own images too.

    Args:
        images: uint8 [C, E, channels, H, W], on any device.
        class_names: C names, or None for "0", "1", ...

    Attributes:
        images: the given tensor, contiguous.
        class_names: list of C strings.

    Raises:
        TypeError: ``images`` is not a uint8 tensor.
        ValueError: ``images`` does not have five dimensions, or the number of names is not C.

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
        """Number of classes C."""
        return self.images.shape[0]

    @property
    def num_examples(self) -> int:
        """Number of images per class E."""
        return self.images.shape[1]

    def to(self, device: str | torch.device) -> ClassImages:
        """Source with the same images on ``device``."""
        moved = copy.copy(self)
        moved.images = self.images.to(device)
        return moved

    def check(self, ways: int, shots: int, queries: int) -> None:
        """Raise ValueError if there are too few classes, or too few images per class."""
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
        """Draw T tasks of N classes, with ``shots`` support and ``queries`` query images of each.

        The classes of a task are distinct, in random order, and labelled 0..N-1 in this order. No
        image is drawn twice. Images are float32 in [0, 1], labels int64, both class-major.

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
        # Division rounds differently on CPU and CUDA; this product does not, and maps 255 to 1.
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

    Every index gets a random 64-bit key, and the smallest keys are chosen. The low bits of a key
    are the index itself. So keys never tie, and ``np.partition`` suffices, which is faster than
    ``np.argpartition``.

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
    """Number in [0, 1) that depends only on the two strings: fixed splits on every machine."""
    digest = hashlib.sha256(f"{salt}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
