"""Few-shot episodes, their sources, and reproducible streams of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from fastmeta.core.checks import check_count, check_device


class Episode(NamedTuple):
    """T few-shot tasks as four tensors, each with the task dimension first.

    Classification: ``support_x`` [T, S, ...] with ``support_y`` [T, S] int64 labels in 0..N-1,
    ``query_x`` [T, Q, ...] with ``query_y`` [T, Q]; S = N * shots, Q = N * queries, in class-major
    order. Regression: ``support_y`` [T, S, 1] and ``query_y`` [T, Q, 1] in the dtype of x.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, device: str | torch.device) -> Episode:
        """Copy the episode to another device."""
        return Episode(*(tensor.to(device) for tensor in self))


@runtime_checkable
class Source(Protocol):
    """Source of episodes: the three methods that your own data set needs."""

    def to(self, device: str | torch.device) -> Source:
        """Source with the same data whose episodes are on ``device``."""

    def check(self, ways: int, shots: int, queries: int) -> None:
        """Raise ValueError if the source has too few classes or examples for such tasks."""

    def sample(
        self, rng: np.random.Generator, tasks: int, ways: int, shots: int, queries: int
    ) -> Episode:
        """Draw tasks that depend only on the arguments and on the state of ``rng``."""


class Episodes:
    """Stream of episodes, endless or not; ``episodes[i]`` depends only on the seed and on ``i``.

    All random numbers come from numpy's counter-based Philox generator (Salmon et al. 2011) on the
    CPU, with the key (seed, i). A resumed run therefore continues with the same episodes as a run
    without interruption, and all devices get the same ones.

    Args:
        source: an :class:`Omniglot`, :class:`Glyphs`, :class:`Sinusoid`, or any :class:`Source`.
        ways: N, classes per task, at least 1 (1 for regression).
        shots: support examples per class, at least 1.
        queries: query examples per class; 0 gives empty query tensors.
        tasks: T, tasks per episode; 0 gives empty tensors.
        seed: 0 to 2**64 - 1.
        device: device of the source and its episodes; the source is moved there once.
        length: number of episodes, for ``len()`` and
            ``torch.utils.data.DataLoader(episodes, batch_size=None)``; None: endless.

    Raises:
        TypeError: a count or the seed is not an integer, or ``source`` is not a source.
        ValueError: a count or the seed is out of range, the device is unknown, or the source has
            too few classes or too few examples per class.

    Example::

        >>> from fastmeta.data import Episodes, Sinusoid
        >>> episodes = Episodes(Sinusoid(), ways=1, shots=10, queries=15, tasks=4, seed=1)
        >>> episodes[7].support_x.shape, episodes[7].query_y.shape
        (torch.Size([4, 10, 1]), torch.Size([4, 15, 1]))
        >>> first = next(iter(episodes))        # equals episodes[0]
    """

    def __init__(
        self,
        source: Source,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        length: int | None = None,
    ) -> None:
        self.length = None if length is None else check_count("length", length, least=0)
        self.ways = check_count("ways", ways, least=1)
        self.shots = check_count("shots", shots, least=1)
        self.queries = check_count("queries", queries, least=0)
        self.tasks = check_count("tasks", tasks, least=0)
        self.seed = check_count("seed", seed, least=0, below=2**64)
        if not isinstance(source, Source):
            raise TypeError(
                f"source: expected methods to, check and sample, got {type(source).__name__}"
            )
        source.check(self.ways, self.shots, self.queries)
        self.source = source.to(check_device(device))

    def __getitem__(self, index: int) -> Episode:
        counter = check_count("index", index, least=0, below=2**64)
        if self.length is not None and counter >= self.length:
            raise IndexError(f"index: expected below the length {self.length}, got {counter}")
        rng = np.random.Generator(np.random.Philox(_Key(self.seed, counter)))  # type: ignore[arg-type]
        return self.source.sample(rng, self.tasks, self.ways, self.shots, self.queries)

    def __iter__(self) -> Iterator[Episode]:
        indices = itertools.count() if self.length is None else range(self.length)
        return map(self.__getitem__, indices)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("length: expected a number of episodes for len(), got None: endless")
        return self.length

    def __bool__(self) -> bool:
        return self.length != 0


class _Key(ISeedSequence):
    """Seed sequence that makes ``Philox(_Key(seed, index))`` equal ``Philox(key=[seed, index])``.

    The latter also asks the system for entropy, for a seed sequence that it never uses. That takes
    longer than to draw the numbers of a small episode.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._words = np.array([seed, index], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return the key, which Philox requests as two words of 64 bits."""
        return self._words
