"""Reproducible streams of few-shot episodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from fastmeta.core.checks import check_count, check_device
from fastmeta.data.class_examples import ClassExamples
from fastmeta.data.episode import Episode, Origin, Source, padded
from fastmeta.data.labelled import ClassDataset, ClassTensors

# A generator's key is (seed, index). Its counter says for what: the second of four words.
_EPISODE, _TASK, _ORDER, _TRANSFORM, _SIZES, _TASK_SIZES = range(6)

# A number, or the least and the largest of a range from which each task draws its own.
Size = int | tuple[int, int]


class Episodes:
    """Stream of episodes, endless or not; ``episodes[i]`` depends only on the seed and on ``i``.

    All random numbers come from numpy's counter-based Philox generator (Salmon et al. 2011) on the
    CPU, with the key (seed, i). A resumed run therefore continues with the same episodes as a run
    without interruption, and all devices get the same ones.

    Args:
        source: an :class:`Omniglot`, :class:`ImageFolder`, :class:`Sinusoid`, or any
            :class:`Source`; or a pair ``(features, labels)``, see :class:`ClassTensors`; or a data
            set of PyTorch with items ``(x, label)``, see :class:`ClassDataset`.
        ways: N, classes per task, at least 1 (1 for regression). A pair ``(5, 20)`` is a range
            with both ends, from which each task draws its own number; so are pairs of the next two.
            Smaller tasks are then padded, see :class:`Episode`.
        shots: support examples per class, at least 1; the same for all classes of a task.
        queries: query examples per class; 0 gives empty query tensors.
        tasks: T, tasks per episode; 0 gives empty tensors.
        seed: 0 to 2**64 - 1.
        device: device of the source and its episodes; the source is moved there once.
        length: number of episodes, for ``len()`` and
            ``torch.utils.data.DataLoader(episodes, batch_size=None)``; None: endless.
        num_tasks: number of different tasks that the stream has. Each is seen once before any is
            seen again, in a new random order each time; None: every task is a new draw.
        transform: function of an :class:`Episode` that returns one, for example
            ``lambda episode: episode.map_inputs(normalise)``. Random numbers that it takes from
            PyTorch follow the seed, too.

    Raises:
        TypeError: a count or the seed is not an integer, or ``source`` is not a source; a range
            with a source of regression, whose targets have no number that means padding.
        ValueError: a count or the seed is out of range, a range ends before it begins, the device
            is unknown, or the source has too few classes or too few examples per class.

    Example::

        >>> from fastmeta.data import Episodes, Sinusoid
        >>> episodes = Episodes(Sinusoid(), ways=1, shots=10, queries=15, tasks=4, seed=1)
        >>> episodes[7].support_x.shape, episodes[7].query_y.shape
        (torch.Size([4, 10, 1]), torch.Size([4, 15, 1]))
        >>> first = next(iter(episodes))        # equals episodes[0]

    Tasks of unequal size::

        >>> import torch
        >>> from fastmeta.data import ClassTensors
        >>> source = ClassTensors(torch.randn(30, 8), torch.arange(30) // 3)
        >>> episodes = Episodes(source, ways=(2, 5), shots=(1, 2), queries=1, tasks=4)
        >>> (episodes[0].query_y >= 0).sum(1)        # their numbers of ways
        tensor([5, 2, 3, 5])
    """

    def __init__(
        self,
        source: Source | tuple[Any, Any] | Any,
        ways: Size,
        shots: Size,
        queries: Size,
        tasks: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        length: int | None = None,
        num_tasks: int | None = None,
        transform: Callable[[Episode], Episode] | None = None,
    ) -> None:
        self.length = None if length is None else check_count("length", length, least=0)
        self.ways = _check_size("ways", ways, least=1)
        self.shots = _check_size("shots", shots, least=1)
        self.queries = _check_size("queries", queries, least=0)
        self.tasks = check_count("tasks", tasks, least=0)
        self.seed = check_count("seed", seed, least=0, below=2**64)
        self.num_tasks = None if num_tasks is None else check_count("num_tasks", num_tasks, least=1)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: expected a function, got {type(transform).__name__}")
        self.transform = transform
        source = as_source(source)
        source.check(*self._largest)
        self.source = source.to(check_device(device))
        if self._is_ragged and self._no_task().support_y.is_floating_point():
            raise TypeError(
                "source: expected one with labels for ranges of ways, shots or queries, as label "
                "-1 marks padding, got one of regression"
            )

    def __getitem__(self, index: int) -> Episode:
        index = self._check(index)
        if self._draws_together:
            episode = self.source.sample(self._rng(index), self.tasks, *self._largest)
        else:
            drawn = [self.source.sample(rng, 1, *sizes) for rng, sizes in self._each_task(index)]
            episode = padded(drawn or [self._no_task()])
        return episode if self.transform is None else self._transformed(episode, index)

    def origin(self, index: int) -> Origin:
        """Names of the classes and of the examples of ``episodes[index]``.

        Raises:
            TypeError: the source has no classes of examples, or the argument is not an integer.
            ValueError: the index is out of range.
        """
        index = self._check(index)
        if not isinstance(self.source, ClassExamples):
            raise TypeError(
                "source: expected classes of examples, which have names, got "
                f"{type(self.source).__name__}"
            )
        if self._draws_together:
            return self.source.origin(self._rng(index), self.tasks, *self._largest)
        origins = [self.source.origin(rng, 1, *sizes) for rng, sizes in self._each_task(index)]
        return Origin(*([task for (task,) in column] for column in zip(*origins, strict=True)))

    def __iter__(self) -> Iterator[Episode]:
        indices = itertools.count() if self.length is None else range(self.length)
        return map(self.__getitem__, indices)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("length: expected a number of episodes for len(), got None: endless")
        return self.length

    def __bool__(self) -> bool:
        return self.length != 0

    def _check(self, index: int) -> int:
        counter = check_count("index", index, least=0, below=2**64)
        if self.length is not None and counter >= self.length:
            raise IndexError(f"index: expected below the length {self.length}, got {counter}")
        return counter

    def _rng(self, index: int, purpose: int = _EPISODE) -> np.random.Generator:
        key: Any = _Key(self.seed, index)
        counter = [0, purpose, 0, 0] if purpose else None
        return np.random.Generator(np.random.Philox(key, counter=counter))

    @property
    def _ranges(self) -> list[tuple[int, int]]:
        sizes = self.ways, self.shots, self.queries
        return [size if isinstance(size, tuple) else (size, size) for size in sizes]

    @property
    def _largest(self) -> list[int]:
        """Ways, shots and queries of the largest task."""
        return [most for _, most in self._ranges]

    @property
    def _is_ragged(self) -> bool:
        return any(isinstance(size, tuple) for size in (self.ways, self.shots, self.queries))

    @property
    def _draws_together(self) -> bool:
        """Whether one call of the source draws all tasks of an episode."""
        return self.num_tasks is None and not self._is_ragged

    def _no_task(self) -> Episode:
        return self.source.sample(self._rng(0), 0, *self._largest)

    def _each_task(self, index: int) -> Iterator[tuple[np.random.Generator, list[int]]]:
        """The generator of each task of an episode, and its ways, shots and queries."""
        if self.num_tasks is None:
            rng, sizes_rng = self._rng(index), self._rng(index, _SIZES)
            pairs = [(rng, sizes_rng)] * self.tasks
        else:
            tasks = self._fixed_tasks(index)
            pairs = [(self._rng(task, _TASK), self._rng(task, _TASK_SIZES)) for task in tasks]
        low, high = zip(*self._ranges, strict=True)
        for rng, sizes_rng in pairs:
            yield rng, sizes_rng.integers(low, high, endpoint=True).tolist()

    def _fixed_tasks(self, index: int) -> list[int]:
        """Numbers of the tasks of an episode, of the ``num_tasks`` that there are."""
        assert self.num_tasks is not None
        places = [divmod(index * self.tasks + t, self.num_tasks) for t in range(self.tasks)]
        orders = {
            turn: self._rng(turn, _ORDER).permutation(self.num_tasks) for turn in dict(places)
        }
        return [int(orders[turn][place]) for turn, place in places]

    def _transformed(self, episode: Episode, index: int) -> Episode:
        assert self.transform is not None
        cuda = episode.support_x.device.type == "cuda"
        with torch.random.fork_rng(devices=[episode.support_x.device] if cuda else []):
            torch.manual_seed(int(self._rng(index, _TRANSFORM).integers(2**63)))
            changed = self.transform(episode)
        if not (
            isinstance(changed, tuple)
            and len(changed) == len(Episode._fields)
            and all(isinstance(part, Tensor) for part in changed)
        ):
            raise TypeError(
                f"transform: expected it to return an Episode, got {type(changed).__name__}"
            )
        return Episode(*changed)


def _check_size(name: str, size: Size, least: int) -> Size:
    """The size as a number, or as a range of numbers."""
    if not isinstance(size, (tuple, list)):
        return check_count(name, size, least=least)
    if len(size) != 2:
        raise ValueError(f"{name}: expected a number or a range (least, most), got {size!r}")
    low, high = (check_count(name, end, least=least) for end in size)
    if low > high:
        raise ValueError(f"{name}: expected a range (least, most) with least <= most, got {size!r}")
    return low, high


def as_source(source: Any) -> Source:
    """Source of what people have: a source, a pair ``(features, labels)``, or a data set.

    Raises:
        TypeError: it is none of them. Errors of :class:`ClassTensors` and :class:`ClassDataset`
            pass through.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, tuple) and len(source) == 2:
        return ClassTensors(*source)
    is_other = isinstance(source, (Tensor, np.ndarray, str, dict))
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not is_other:
        return ClassDataset(source)
    raise TypeError(
        "source: expected a source, with methods to, check and sample, a pair (features, labels) "
        f"or a data set with items (x, label), got {type(source).__name__}"
    )


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
