"""Tasks from classes of examples: which classes and which of their examples a task gets."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmeta.core.checks import check_count
from fastmeta.data.episode import Episode, Origin

_Self = TypeVar("_Self", bound="ClassExamples")
_NAMED = 8  # classes that a message lists


class ClassExamples(ABC):
    """Classes of examples, not necessarily equally many of each. Base of the sources with classes.

    Args:
        rows: number of every example in the storage of the subclass, class by class.
        counts: number of examples of each class.
        class_names: names of the classes.
    """

    def __init__(self, rows: np.ndarray, counts: np.ndarray, class_names: Sequence[str]) -> None:
        self._take(rows, counts, class_names)

    def _take(self, rows: np.ndarray, counts: np.ndarray, class_names: Sequence[str]) -> None:
        self._rows = rows
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self.class_names = list(class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self._counts)

    @property
    def counts(self) -> list[int]:
        """Number of examples of each class."""
        return self._counts.tolist()

    @property
    def num_examples(self) -> int:
        """Number of examples of the smallest class E; 0 without classes."""
        return int(self._counts.min()) if self.num_classes else 0

    @abstractmethod
    def _inputs(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Examples [n, ...] of the rows [n] of the storage, as learners take them."""

    def _example_name(self, row: int) -> str:
        """Name of an example: by default its number."""
        return str(row)

    def subset(self: _Self, classes: Sequence[int]) -> _Self:
        """Source of the classes with these numbers, in this order, and of no others."""
        part = copy.copy(self)
        chosen = np.asarray(classes, dtype=np.int64)
        spans = [np.arange(self._starts[i], self._starts[i] + self._counts[i]) for i in chosen]
        rows = self._rows[np.concatenate([np.arange(0), *spans])]
        names = [self.class_names[i] for i in chosen]
        part._take(rows, self._counts[chosen], names)
        return part

    def at_least(self: _Self, examples: int) -> _Self:
        """Source of the classes with so many examples; a warning names the others.

        Raises:
            ValueError: no class has so many.
        """
        examples = check_count("examples", examples, least=0)
        small = {self.class_names[i]: n for i, n in enumerate(self.counts) if n < examples}
        if small and len(small) == self.num_classes:
            raise ValueError(
                f"examples: expected at most the {max(self.counts)} of the largest class, "
                f"got {examples}"
            )
        warn_of_small(small, self.num_classes, examples, "examples")
        large = [i for i, n in enumerate(self.counts) if n >= examples]
        return self.subset(large) if small else self

    def check(self, ways: int, shots: int, queries: int) -> None:
        """Raise ValueError if there are too few classes, or a class has too few examples."""
        ways = check_count("ways", ways, least=1)
        shots = check_count("shots", shots, least=1)
        queries = check_count("queries", queries, least=0)
        if ways > self.num_classes:
            raise ValueError(
                f"ways: expected at most the {self.num_classes} classes of the source, got {ways}"
            )
        if shots + queries > self.num_examples:
            asked = f"got {shots} + {queries}"
            if self.num_examples < self._counts.max():
                smallest = self.class_names[int(self._counts.argmin())]
                raise ValueError(
                    f"shots + queries: expected at most {self.num_examples}, the size of the "
                    f"smallest class, {smallest}, {asked}; source.at_least({shots + queries}) "
                    "leaves small classes out"
                )
            raise ValueError(
                "shots + queries: expected at most the "
                f"{self.num_examples} examples of a class, {asked}"
            )

    def sample(
        self, rng: np.random.Generator, tasks: int, ways: int, shots: int, queries: int
    ) -> Episode:
        """Draw T tasks of N classes, with ``shots`` support and ``queries`` query examples of each.

        The classes of a task are distinct, in random order, and labelled 0..N-1 in this order. No
        example is drawn twice. Support and query are class-major.

        Returns:
            Episode with x [T, N * shots, ...] and [T, N * queries, ...], and int64 labels.

        Raises:
            ValueError: as :meth:`check`; or ``tasks`` is negative.
        """
        _, rows = self._draw(rng, tasks, ways, shots, queries)
        support_x, support_y = self._gather(rows[:, :, :shots], rng)
        query_x, query_y = self._gather(rows[:, :, shots:], rng)
        return Episode(support_x, support_y, query_x, query_y)

    def origin(
        self, rng: np.random.Generator, tasks: int, ways: int, shots: int, queries: int
    ) -> Origin:
        """Names of the classes and examples that :meth:`sample` draws with the same arguments."""
        classes, rows = self._draw(rng, tasks, ways, shots, queries)

        def names(part: np.ndarray) -> list[list[str]]:
            return [[self._example_name(row) for row in task] for task in part.reshape(tasks, -1)]

        class_names = [[self.class_names[i] for i in task] for task in classes]
        return Origin(class_names, names(rows[:, :, :shots]), names(rows[:, :, shots:]))

    def _draw(
        self, rng: np.random.Generator, tasks: int, ways: int, shots: int, queries: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Classes [T, N] of the tasks, and rows [T, N, shots + queries] of the storage."""
        self.check(ways, shots, queries)
        tasks = check_count("tasks", tasks, least=0)
        classes = draw_distinct(rng, (tasks,), self.num_classes, ways)
        examples = draw_distinct(rng, (tasks, ways), self._counts[classes], shots + queries)
        return classes, self._rows[self._starts[classes][..., None] + examples]

    def _gather(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        tasks, ways, each = rows.shape
        x = self._inputs(rows.reshape(-1), rng)
        labels = torch.arange(ways, device=x.device).repeat_interleave(each)
        return (
            x.view(tasks, ways * each, *x.shape[1:]),
            labels.expand(tasks, ways * each).contiguous(),
        )


def warn_of_small(small: Mapping[str, int], classes: int, least: int, things: str) -> None:
    """Warn that the classes in ``small``, with their sizes, are left out, if there are some."""
    if not small:
        return
    named = [f"{name} ({size})" for name, size in small.items()]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    warnings.warn(
        f"{len(small)} of {classes} classes have fewer than {least} {things} and are left out: "
        f"{', '.join(named[:_NAMED])}{more}",
        stacklevel=4,
    )


def draw_distinct(
    rng: np.random.Generator, shape: tuple[int, ...], population: int | np.ndarray, draws: int
) -> np.ndarray:
    """For each entry of ``shape``, ``draws`` distinct indices below ``population`` in random order.

    ``population`` is a number, or an array of ``shape`` with a number for each entry. Every index
    gets a random 64-bit key, and the smallest keys are chosen. The low bits of a key are the index
    itself. So keys never tie, and ``np.partition`` suffices, which is faster than
    ``np.argpartition``. Indices beyond an entry's population get the largest keys.

    Returns:
        int64 array of shape [*shape, draws]; uniform over ordered draws.
    """
    sizes = np.asarray(population)
    largest = int(sizes.max(initial=draws))  # there may be no entry
    mask = np.uint64((1 << (largest - 1).bit_length()) - 1)
    keys = rng.integers(1 << 64, size=(*shape, largest), dtype=np.uint64)
    keys &= ~mask
    if sizes.ndim and sizes.size and sizes.min() < largest:
        keys[np.arange(largest) >= sizes[..., None]] = ~mask
    keys |= np.arange(largest, dtype=np.uint64)
    chosen = np.partition(keys, draws - 1, axis=-1)[..., :draws]
    chosen.sort(axis=-1)
    return (chosen & mask).astype(np.int64)
