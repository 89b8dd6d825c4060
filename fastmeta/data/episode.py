"""What every source of few-shot tasks gives: an episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT


class Episode(NamedTuple):
    """T few-shot tasks as four tensors, each with the task dimension first.

    Classification: ``support_x`` [T, S, ...] with ``support_y`` [T, S] int64 labels in 0..N-1,
    ``query_x`` [T, Q, ...] with ``query_y`` [T, Q]; S = N * shots, Q = N * queries, in class-major
    order. Regression: ``support_y`` [T, S, 1] and ``query_y`` [T, Q, 1] in the dtype of x.

    Tasks of unequal size have S and Q of the largest one. Behind the examples of a smaller task
    there is padding: label -1, inputs 0. Learners and ops take label -1 for an absent example.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, device: str | torch.device) -> Episode:
        """Copy the episode to another device."""
        return Episode(*(tensor.to(device) for tensor in self))

    def map_inputs(self, function: Callable[[Tensor], Tensor]) -> Episode:
        """Episode with ``function(support_x)`` and ``function(query_x)`` as its inputs."""
        return self._replace(support_x=function(self.support_x), query_x=function(self.query_x))


def padded(episodes: Sequence[Episode]) -> Episode:
    """One episode of the tasks of several, padded to the most examples: label -1, inputs 0."""
    columns = zip(*episodes, strict=True)
    fills = (0, ABSENT) * 2
    return Episode(*(_cat(column, fill) for column, fill in zip(columns, fills, strict=True)))


def _cat(parts: Sequence[Tensor], fill: int) -> Tensor:
    """Concatenate parts ``[T, E, ...]`` along the tasks, each filled up to the largest E."""
    most = max(part.shape[1] for part in parts)
    if all(part.shape[1] == most for part in parts):
        return torch.cat(list(parts))
    first = parts[0]
    out = first.new_full((sum(map(len, parts)), most, *first.shape[2:]), fill)
    for target, part in zip(out.split([len(part) for part in parts]), parts, strict=True):
        target[:, : part.shape[1]] = part
    return out


class Origin(NamedTuple):
    """Where the examples of an episode of T tasks and N ways come from.

    ``class_names`` [T][N]: the class of each label. ``support`` [T][S] and ``query`` [T][Q]: the
    name of each example: its file, or its number in the source. Padding has no name: N, S and Q are
    those that the task has.
    """

    class_names: list[list[str]]
    support: list[list[str]]
    query: list[list[str]]


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
