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
from fastmeta.data.episode import Episode, Origin, Source
from fastmeta.data.labelled import ClassDataset, ClassTensors

# A generator's key is (seed, index). Its counter says for what: the second of four words.
_EPISODE, _TASK, _ORDER, _TRANSFORM = range(4)


class Episodes:
    """Stream of episodes, endless or not; ``episodes[i]`` depends only on the seed and on ``i``.

    All random numbers come from numpy's counter-based Philox generator (Salmon et al. 2011) on the
    CPU, with the key (seed, i). A resumed run therefore continues with the same episodes as a run
    without interruption, and all devices get the same ones.

    Args:
        source: an :class:`Omniglot`, :class:`ImageFolder`, :class:`Sinusoid`, or any
            :class:`Source`; or a pair ``(features, labels)``, see :class:`ClassTensors`; or a data
            set of PyTorch with items ``(x, label)``, see :class:`ClassDataset`.
        ways: N, classes per task, at least 1 (1 for regression).
        shots: support examples per class, at least 1.
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
        source: Source | tuple[Any, Any] | Any,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        length: int | None = None,
        num_tasks: int | None = None,
        transform: Callable[[Episode], Episode] | None = None,
    ) -> None:
        self.length = None if length is None else check_count("length", length, least=0)
        self.ways = check_count("ways", ways, least=1)
        self.shots = check_count("shots", shots, least=1)
        self.queries = check_count("queries", queries, least=0)
        self.tasks = check_count("tasks", tasks, least=0)
        self.seed = check_count("seed", seed, least=0, below=2**64)
        self.num_tasks = None if num_tasks is None else check_count("num_tasks", num_tasks, least=1)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: expected a function, got {type(transform).__name__}")
        self.transform = transform
        source = as_source(source)
        source.check(self.ways, self.shots, self.queries)
        self.source = source.to(check_device(device))

    def __getitem__(self, index: int) -> Episode:
        index = self._check(index)
        shape = self.ways, self.shots, self.queries
        if self.num_tasks is None:
            episode = self.source.sample(self._rng(index), self.tasks, *shape)
        else:
            drawn = [
                self.source.sample(self._rng(task, _TASK), 1, *shape)
                for task in self._fixed_tasks(index)
            ]
            nothing = [] if drawn else [self.source.sample(self._rng(0), 0, *shape)]
            episode = Episode(*map(torch.cat, zip(*drawn, *nothing, strict=True)))
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
        shape = self.ways, self.shots, self.queries
        if self.num_tasks is None:
            return self.source.origin(self._rng(index), self.tasks, *shape)
        origins = [
            self.source.origin(self._rng(task, _TASK), 1, *shape)
            for task in self._fixed_tasks(index)
        ]
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
