"""Episodes from what people have: tensors, arrays and data sets, whatever the sizes of classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from fastmeta.data import ClassDataset, ClassTensors, Episode, Episodes, Sinusoid

SIZES = [3, 9, 4, 5]
LABELS = np.random.default_rng(0).permutation(np.repeat([7, 2, 40, 11], SIZES))
FEATURES = torch.stack([torch.from_numpy(LABELS), torch.arange(len(LABELS))], 1).double()


class Items(Dataset):
    """Items (x, label), of which it counts how many were read."""

    def __init__(self, features=FEATURES, labels=LABELS):
        self.features, self.own = features, labels
        self.reads = 0

    def __len__(self):
        return len(self.own)

    def __getitem__(self, index):
        self.reads += 1
        return self.features[index], self.own[index]


class WithTargets(Items):
    def __init__(self, change=None):
        super().__init__()
        self.targets, self.target_transform = LABELS.tolist(), change
        self.classes = [f"class {i}" for i in range(50)]

    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return x, self.target_transform(label) if self.target_transform else label


def as_strings() -> ClassTensors:
    return ClassTensors(FEATURES, [f"{label:02d}" for label in LABELS])


SOURCES = {
    "tensors": lambda: (FEATURES, torch.from_numpy(LABELS)),
    "arrays": lambda: (FEATURES.numpy(), LABELS),
    "strings": as_strings,
    "items": Items,
    "tuples": lambda: [(x.numpy(), int(label)) for x, label in zip(FEATURES, LABELS, strict=True)],
    "TensorDataset": lambda: TensorDataset(FEATURES, torch.from_numpy(LABELS)),
    "targets": WithTargets,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_all_of_them_give_the_same_episodes(make):
    episode = Episodes(make(), ways=3, shots=1, queries=2, tasks=20, seed=3)[4]
    expected = Episodes((FEATURES, LABELS), ways=3, shots=1, queries=2, tasks=20, seed=3)[4]
    assert all(torch.equal(a, b) for a, b in zip(episode, expected, strict=True))
    classes, rows = episode.query_x.long().unbind(-1)
    assert torch.equal(classes, torch.from_numpy(LABELS)[rows])
    support = episode.support_x[..., 0].long()
    assert torch.equal(support.gather(1, episode.query_y), classes)
    together = torch.cat([episode.support_x[..., 1], episode.query_x[..., 1]], 1)
    assert all(len(task.unique()) == 9 for task in together)


def test_every_example_of_a_large_class_is_drawn_as_often_as_another():
    episodes = Episodes((FEATURES, LABELS), ways=4, shots=1, queries=0, tasks=9000)
    rows = episodes[0].support_x[..., 1].long().flatten()
    drawn = torch.bincount(rows, minlength=len(LABELS)).double()
    expected = 9000.0 / torch.tensor([SIZES[[7, 2, 40, 11].index(label)] for label in LABELS])
    assert ((drawn - expected).abs() < 5 * expected.sqrt()).all()


def test_class_names_and_rows_of_an_episode():
    source = ClassDataset(WithTargets())
    assert source.class_names == ["class 2", "class 7", "class 11", "class 40"]
    assert ClassTensors(FEATURES, LABELS).class_names == ["2", "7", "11", "40"]
    episodes = Episodes(source, ways=2, shots=1, queries=2, tasks=5, seed=1)
    origin, episode = episodes.origin(2), episodes[2]
    assert origin.query == [[str(int(x[1])) for x in task] for task in episode.query_x]
    assert origin.class_names == [[f"class {int(x[0])}" for x in t] for t in episode.support_x]
    with pytest.raises(TypeError, match=r"expected classes of examples, .* got Sinusoid"):
        Episodes(Sinusoid(), 1, 2, 3, tasks=1).origin(0)


@pytest.mark.parametrize(
    ("dataset", "reads"),
    [(WithTargets(), 0), (Subset(WithTargets(), range(5, 21)), 0), (Items(), len(LABELS))],
    ids=["targets", "subset", "items"],
)
def test_items_are_not_read_for_labels_that_the_data_set_keeps(dataset, reads):
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    inner.reads = 0
    source = ClassDataset(dataset)
    assert inner.reads == reads
    Episodes(source, ways=2, shots=1, queries=1, tasks=3)[0]
    assert inner.reads == reads + 12


def test_labels_behind_a_target_transform_and_of_parts():
    negated = ClassDataset(WithTargets(change=lambda label: -int(label)))
    assert negated.class_names == ["-40", "-11", "-7", "-2"]
    both = ClassDataset(ConcatDataset([WithTargets(), Subset(WithTargets(), [0, 1])]))
    assert sum(both.counts) == len(LABELS) + 2
    Episodes(both, ways=3, shots=1, queries=1, tasks=30)[0]
    given = ClassDataset(Items(), labels=LABELS.tolist())
    assert given.dataset.reads == 0


class Noisy(Items):
    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return x + torch.randn(2), label


def test_random_transforms_follow_the_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, again = (Episodes(Noisy(), 2, 1, 1, tasks=3, seed=9) for _ in range(2))
    assert torch.equal(one[5].query_x, again[5].query_x)
    assert not torch.equal(one[5].query_x, one[6].query_x)
    assert not torch.equal(one[5].query_x, Episodes(Items(), 2, 1, 1, tasks=3, seed=9)[5].query_x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_transform_of_episodes():
    def noisy(x: Tensor) -> Tensor:
        return x / 2 + torch.randn(x.shape, dtype=x.dtype)

    episodes, plain = (
        Episodes((FEATURES, LABELS), 2, 1, 1, tasks=3, transform=change)
        for change in (lambda episode: episode.map_inputs(noisy), None)
    )
    assert torch.equal(episodes[1].support_x, episodes[1].support_x)
    noise = episodes[1].support_x - plain[1].support_x / 2
    assert 0 < noise.abs().max() < 6 and torch.equal(episodes[1].query_y, plain[1].query_y)
    with pytest.raises(TypeError, match="transform: expected it to return an Episode, got Tensor"):
        Episodes((FEATURES, LABELS), 2, 1, 1, 3, transform=lambda episode: episode.query_x)[0]
    with pytest.raises(TypeError, match="transform: expected a function, got int"):
        Episodes((FEATURES, LABELS), 2, 1, 1, 3, transform=3)


def tasks_of(episode: Episode) -> list[tuple]:
    return [tuple(task.flatten().tolist()) for task in episode.support_x]


def test_a_fixed_number_of_tasks_comes_in_turns():
    options = {"ways": 3, "shots": 1, "queries": 1, "tasks": 4}
    episodes = Episodes((FEATURES, LABELS), **options, seed=2, num_tasks=10)
    seen = [task for i in range(10) for task in tasks_of(episodes[i])]
    turns = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert len(set(turns[0])) == 10
    assert all(set(turn) == set(turns[0]) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    names = [task for i in range(10) for task in episodes.origin(i).support]
    assert [[str(int(n)) for n in task[1::2]] for task in seen] == names
    other = Episodes((FEATURES, LABELS), **options, seed=3, num_tasks=10)
    assert set(tasks_of(other[0])).isdisjoint(turns[0])
    nothing = Episodes((FEATURES, LABELS), **{**options, "tasks": 0}, num_tasks=10)[0]
    assert nothing.support_x.shape == (0, 3, 2)
    waves = Episodes(Sinusoid(), 1, 5, 5, tasks=6, num_tasks=3)[0]
    assert len(waves.query_x.unique(dim=0)) == 3


def test_a_data_loader_reads_them_in_its_workers():
    episodes = Episodes(Items(), 2, 1, 1, tasks=3, length=4)
    loaded = list(DataLoader(episodes, batch_size=None, num_workers=2))
    assert len(loaded) == 4
    for there, here in zip(loaded, episodes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def pictures():
    from PIL import Image

    return [(Image.new("L", (2, 2)), label) for label in (0, 0, 1, 1)]


WRONG = {
    "another label": (
        lambda: ClassDataset(Items(), labels=LABELS[::-1].copy()),
        ValueError,
        r"labels: item \d+ of the data set has the label \d+, expected \d+",
    ),
    "pictures": (
        pictures,
        TypeError,
        r"that are tensors, arrays or numbers, item \d is a Image; give .*ToTensor\(\)",
    ),
    "shapes": (
        lambda: [(torch.zeros(2 + i % 3), i % 2) for i in range(12)],
        ValueError,
        r"dataset: expected examples of one shape, got \(\d,\) for item \d+ and \(\d,\) for item",
    ),
    "dicts": (lambda: [{"x": 1}] * 4, TypeError, r"expected items \(x, label\), item 0 is dict"),
    "three": (lambda: [(1, 2, 3)] * 4, TypeError, r"items \(x, label\), item 0 is 3 values"),
    "float labels": (
        lambda: (FEATURES, FEATURES[:, 0]),
        TypeError,
        "labels: expected integers or strings, got float64",
    ),
    "one-hot labels": (
        lambda: (FEATURES, torch.eye(len(LABELS))),
        ValueError,
        r"labels: expected 21, one of each example, got \(21, 21\)",
    ),
    "one-hot items": (
        lambda: [(1.0, torch.eye(3)[0])] * 4,
        TypeError,
        r"expected an integer or a string for each example, got a tensor of shape \(3,\)",
    ),
    "few labels": (
        lambda: (FEATURES, LABELS[:4]),
        ValueError,
        r"labels: expected 21, one of each example, got \(4,\)",
    ),
    "no tensor": (lambda: ([1, 2], [0, 1]), TypeError, "expected a tensor or an array .* got list"),
    "a number": (lambda: 3, TypeError, "a source, .* or a data set .* got int"),
    "a tensor": (lambda: FEATURES, TypeError, r"a pair \(features, labels\) .* got Tensor"),
    "small": (
        lambda: (FEATURES[:5], [0, 0, 0, 0, 1]),
        ValueError,
        r"at most 1, the size of the smallest class, 1, got 1 \+ 1; source.at_least\(2\)",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(make, error, message):
    with pytest.raises(error, match=message):
        Episodes(make(), ways=2, shots=1, queries=1, tasks=20)[0]
    with pytest.raises(TypeError, match=r"dataset: expected len.dataset. and dataset.i., got int"):
        ClassDataset(3)


def test_small_classes_can_be_left_out():
    source = as_strings()
    with pytest.warns(UserWarning, match=r"2 of 4 .* than 5 examples .*: 07 \(3\), 40 \(4\)"):
        large = source.at_least(5)
    assert large.class_names == ["02", "11"] and large.counts == [9, 5]
    assert source.at_least(3) is source
    with pytest.raises(ValueError, match="examples: expected at most the 9 of the largest class"):
        source.at_least(10)
    swapped = ClassDataset(Items()).subset([3, 0])
    assert swapped.class_names == ["40", "2"]
    classes = Episodes(swapped, 2, 1, 1, tasks=50)[0].query_x[..., 0]
    assert set(classes.flatten().tolist()) == {40.0, 2.0}
