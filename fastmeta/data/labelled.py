"""Few-shot tasks from what people have: labelled tensors, and data sets of PyTorch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from fastmeta.data.class_examples import ClassExamples


class ClassTensors(ClassExamples):
    """Classes of the rows of a tensor, by their labels; classes may differ in size.

    Args:
        features: tensor or array [M, ...] of M examples. It keeps its dtype and is not copied.
        labels: M integers or strings, in any order.

    The class names are the labels as strings, in sorted order. Examples are named by their row.

    Raises:
        TypeError: ``features`` is no tensor or array, or the labels are not integers or strings.
        ValueError: the number of labels is not M.

    Example::

        >>> import torch
        >>> from fastmeta.data import ClassTensors, Episodes
        >>> source = ClassTensors(torch.randn(100, 64), torch.arange(100) % 7)
        >>> Episodes(source, ways=5, shots=1, queries=4, tasks=3)[0].query_x.shape
        torch.Size([3, 20, 64])
    """

    def __init__(self, features: Tensor | np.ndarray, labels: Any) -> None:
        if isinstance(features, np.ndarray):
            features = torch.from_numpy(features)
        if not isinstance(features, Tensor) or features.ndim == 0:
            came = "a scalar" if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a tensor or an array [M, ...], got {came}")
        super().__init__(*_by_label(_label_array(labels, len(features))))
        self.features = features.detach()

    def to(self, device: str | torch.device) -> ClassTensors:
        """Source with the same features on ``device``."""
        moved = copy.copy(self)
        moved.features = self.features.to(device)
        return moved

    def _inputs(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        return self.features.index_select(0, torch.from_numpy(rows).to(self.features.device))


class ClassDataset(ClassExamples):
    """Classes of a data set of PyTorch with items ``(x, label)``; classes may differ in size.

    Items are read when an episode needs them, so the transforms of the data set apply each time.
    Their random numbers follow the seed of the episodes as long as they come from PyTorch.

    Args:
        dataset: has ``len(dataset)`` and ``dataset[i]``, a pair of an example (tensor, array or
            number) and its label (integer or string).
        labels: label of every item. None: from the attribute ``targets`` or ``labels`` of the data
            set or of the one it is a ``Subset`` of; without them every item is read once.

    The class names are the labels as strings, in sorted order, or ``dataset.classes`` if it names
    each. Examples are named by their index.

    Raises:
        TypeError: ``dataset`` is not of this kind, or an item is not a pair, or the labels are not
            integers or strings.
        ValueError: there is not one label an item. When an episode is drawn: an item
            has another label than ``labels`` says, or examples differ in shape.

    Example::

        dataset = torchvision.datasets.CIFAR100("data", transform=transforms.ToTensor())
        episodes = fastmeta.data.Episodes(dataset, ways=5, shots=1, queries=15, tasks=4)
    """

    def __init__(self, dataset: Any, labels: Any = None) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"dataset: expected len(dataset) and dataset[i], got {type(dataset).__name__}"
            )
        self.dataset = dataset
        self.device = torch.device("cpu")
        if labels is None:
            labels = _labels_of(dataset)
        if labels is None:
            with torch.random.fork_rng(devices=[]):
                labels = [self._item(i)[1] for i in range(len(dataset))]
        self._labels = _label_array(labels, len(dataset))
        super().__init__(*_by_label(self._labels, _names_of(dataset)))

    def to(self, device: str | torch.device) -> ClassDataset:
        """Source with the same items whose episodes are on ``device``."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def _inputs(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            # Without a row, of query=0, the first item tells the shape.
            examples = [self._example(int(row)) for row in (rows if len(rows) else self._rows[:1])]
        shapes = [tuple(example.shape) for example in examples]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"dataset: expected examples of one shape, got {shapes[0]} for item {rows[0]} "
                    f"and {shape} for item {rows[i]}"
                )
        return torch.stack(examples)[: len(rows)].to(self.device)

    def _example(self, index: int) -> Tensor:
        x, label = self._item(index)
        if _plain(label) != self._labels[index]:
            raise ValueError(
                f"labels: item {index} of the data set has the label {label}, expected "
                f"{self._labels[index]}"
            )
        if not isinstance(x, (Tensor, np.ndarray, np.generic, int, float)):
            raise TypeError(
                f"dataset: expected examples that are tensors, arrays or numbers, item {index} is "
                f"a {type(x).__name__}; give the data set a transform to tensors, such as "
                "torchvision.transforms.ToTensor()"
            )
        return torch.as_tensor(x)

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            came = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
            raise TypeError(f"dataset: expected items (x, label), item {index} is {came}")
        return item[0], item[1]


def _labels_of(dataset: Any) -> Any:
    """Labels that the data set keeps, without reading its items; None if it keeps none."""
    if isinstance(dataset, Subset):
        labels = _labels_of(dataset.dataset)
        return None if labels is None else [labels[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [*itertools.chain(*parts)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    change = getattr(dataset, "target_transform", None)
    return labels if labels is None or change is None else [change(label) for label in labels]


def _names_of(dataset: Any) -> Sequence[str]:
    """Names of the classes by their number, if the data set has some."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    return names if isinstance(names, (list, tuple)) else ()


def _plain(label: Any) -> Any:
    """The label as Python's own value."""
    if isinstance(label, Tensor) and label.numel() != 1:
        raise TypeError(
            "labels: expected an integer or a string for each example, got a tensor of shape "
            f"{tuple(label.shape)}"
        )
    return label.item() if isinstance(label, (Tensor, np.generic)) else label


def _label_array(labels: Any, count: int) -> np.ndarray:
    """Labels as an array [count] of integers or strings."""
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    if not isinstance(labels, np.ndarray):
        labels = np.array([_plain(label) for label in labels])
    if labels.shape != (count,):
        raise ValueError(f"labels: expected {count}, one of each example, got {labels.shape}")
    if count and labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        labels = labels.astype(str)
    if count and labels.dtype.kind not in "biuU":
        raise TypeError(f"labels: expected integers or strings, got {labels.dtype}")
    return labels


def _by_label(
    labels: np.ndarray, names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows class by class, the number of each class, and the classes' names."""
    classes, class_of = np.unique(labels, return_inverse=True)
    numbered = classes.dtype.kind in "iu" and len(classes) and classes[0] >= 0
    if not (numbered and classes[-1] < len(names)):
        names = []
    return (
        np.argsort(class_of, kind="stable"),
        np.bincount(class_of, minlength=len(classes)),
        [str(names[label]) if names else str(label) for label in classes],
    )
