"""Episodes are a pure function of seed and index; ClassImages and Sinusoid hold what they say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmeta.data import ClassImages, Episode, Episodes, Sinusoid
from fastmeta.data.class_examples import draw_distinct

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
]


def coded_source(classes: int = 12, examples: int = 8) -> ClassImages:
    """Images of two pixels: the class and the example."""
    codes = torch.cartesian_prod(torch.arange(classes), torch.arange(examples))
    return ClassImages(codes.to(torch.uint8).view(classes, examples, 1, 1, 2))


def decode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and example [T, S] of each image of a coded source."""
    classes, examples = (x * 255).round().long()[:, :, 0, 0].unbind(-1)
    return classes, examples


def assert_same(left: Episode, right: Episode) -> None:
    for name, a, b in zip(Episode._fields, left, right, strict=True):
        assert torch.equal(a, b), name


# Episodes


@pytest.mark.parametrize("source", [coded_source(), Sinusoid()], ids=["images", "sinusoid"])
def test_an_episode_depends_on_seed_and_index_alone(source: ClassImages | Sinusoid) -> None:
    ways = 5 if isinstance(source, ClassImages) else 1
    streams = [Episodes(source, ways, 2, 3, tasks=4, seed=7) for _ in range(2)]
    late = streams[0][3]
    in_order = list(itertools.islice(streams[1], 4))
    assert_same(late, in_order[3])
    assert_same(streams[0][0], in_order[0])


def test_the_first_episode_of_seed_0_never_changes() -> None:
    episode = Episodes(coded_source(), ways=3, shots=1, queries=1, tasks=2)[0]
    classes, examples = decode(episode.support_x)
    assert classes.tolist() == [[0, 2, 11], [9, 8, 5]]
    assert examples.tolist() == [[1, 6, 3], [6, 6, 2]]
    assert decode(episode.query_x)[1].tolist() == [[4, 3, 4], [1, 0, 5]]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (3, 70_000), (2**64 - 1, 2**64 - 1)])
@pytest.mark.parametrize("source", [coded_source(), Sinusoid()], ids=["images", "sinusoid"])
def test_the_generator_is_philox_with_seed_and_index_for_its_key(
    source: ClassImages | Sinusoid, seed: int, index: int
) -> None:
    ways = 5 if isinstance(source, ClassImages) else 1
    philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    expected = source.sample(np.random.Generator(philox), 4, ways, 2, 3)
    assert_same(Episodes(source, ways, 2, 3, tasks=4, seed=seed)[index], expected)


@pytest.mark.parametrize(("seed", "index"), [(1, 0), (0, 1), (2**64 - 1, 0), (0, 2**64 - 1)])
def test_other_seeds_and_indices_give_other_episodes(seed: int, index: int) -> None:
    first = Episodes(coded_source(), 5, 2, 3, tasks=4)[0]
    other = Episodes(coded_source(), 5, 2, 3, tasks=4, seed=seed)[index]
    assert not torch.equal(first.support_x, other.support_x)


def test_sampling_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    Episodes(coded_source(), 5, 2, 3, tasks=4)[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_sees_the_same_episodes(device: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(16, 16, 1, 1, 1)
    for source, ways in ((ClassImages(values), 5), (Sinusoid(), 1)):
        here = Episodes(source, ways, 1, 2, tasks=50)[0]
        there = Episodes(source, ways, 1, 2, tasks=50, device=device)[0]
        assert {tensor.device.type for tensor in there} == {device}
        assert_same(here, there.to("cpu"))


def test_labels_name_the_classes_of_a_task_in_class_major_order() -> None:
    episode = Episodes(coded_source(), ways=5, shots=2, queries=3, tasks=20)[0]
    support_classes, _ = decode(episode.support_x)
    query_classes, _ = decode(episode.query_x)
    class_of_label = support_classes[:, ::2]
    assert torch.equal(episode.support_y, torch.arange(5).repeat_interleave(2).expand(20, 10))
    assert torch.equal(episode.query_y, torch.arange(5).repeat_interleave(3).expand(20, 15))
    assert torch.equal(support_classes, class_of_label.gather(1, episode.support_y))
    assert torch.equal(query_classes, class_of_label.gather(1, episode.query_y))


def test_a_task_has_no_class_twice_even_when_it_uses_all() -> None:
    classes, _ = decode(Episodes(coded_source(), ways=12, shots=1, queries=0, tasks=30)[0][0])
    assert torch.equal(classes.sort().values, torch.arange(12).expand(30, 12))


def test_support_and_query_never_share_an_image() -> None:
    episode = Episodes(coded_source(), ways=4, shots=3, queries=5, tasks=30)[0]
    _, support = decode(episode.support_x)
    _, query = decode(episode.query_x)
    together = torch.cat([support.view(30, 4, 3), query.view(30, 4, 5)], dim=2)
    assert torch.equal(together.sort().values, torch.arange(8).expand(30, 4, 8))


@pytest.mark.parametrize(("population", "draws"), [(4, 2), (5, 1), (3, 3)])
def test_ordered_draws_are_uniform(population: int, draws: int) -> None:
    trials = 60_000
    drawn = draw_distinct(np.random.default_rng(0), (trials,), population, draws)
    orders = list(itertools.permutations(range(population), draws))
    counts = np.array([(drawn == order).all(axis=1).sum() for order in orders])
    expected = trials / len(orders)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(orders) - 1
    assert counts.sum() == trials
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    """Draws come in the order of their keys, not in whatever order a partition leaves them."""
    long, short = (
        draw_distinct(np.random.default_rng(0), (20,), 4000, draws) for draws in (500, 60)
    )
    np.testing.assert_array_equal(long[:, :60], short)


@settings(max_examples=40, deadline=None)
@given(
    ways=st.integers(1, 6),
    shots=st.integers(1, 4),
    queries=st.integers(0, 4),
    tasks=st.integers(0, 3),
)
def test_shapes_and_dtypes(ways: int, shots: int, queries: int, tasks: int) -> None:
    source = ClassImages(torch.zeros(6, 8, 3, 5, 4, dtype=torch.uint8))
    episode = Episodes(source, ways, shots, queries, tasks)[0]
    assert episode.support_x.shape == (tasks, ways * shots, 3, 5, 4)
    assert episode.support_y.shape == (tasks, ways * shots)
    assert episode.query_x.shape == (tasks, ways * queries, 3, 5, 4)
    assert episode.query_y.shape == (tasks, ways * queries)
    assert [t.dtype for t in episode] == [torch.float32, torch.int64] * 2
    assert all(tensor.is_contiguous() for tensor in episode)


GOOD = {"ways": 5, "shots": 2, "queries": 3, "tasks": 4, "seed": 0, "device": "cpu"}
BAD = [
    ({"ways": 0}, ValueError, "ways: expected an integer >= 1, got 0"),
    ({"ways": 13}, ValueError, "ways: expected at most the 12 classes of the source, got 13"),
    ({"ways": 2.0}, TypeError, "ways: expected an integer >= 1, got 2.0 of type float"),
    ({"ways": True}, TypeError, "ways: .* got the bool True"),
    ({"shots": 0}, ValueError, "shots: expected an integer >= 1, got 0"),
    ({"shots": "1"}, TypeError, "shots: .* got '1' of type str"),
    ({"queries": -1}, ValueError, "queries: expected an integer >= 0, got -1"),
    ({"shots": 4, "queries": 5}, ValueError, r"at most the 8 examples of a class, got 4 \+ 5"),
    ({"tasks": -1}, ValueError, "tasks: expected an integer >= 0, got -1"),
    ({"tasks": None}, TypeError, "tasks: .* got None of type NoneType"),
    ({"seed": -1}, ValueError, "seed: .* got -1"),
    ({"seed": 2**64}, ValueError, f"seed: .* got {2**64}"),
    ({"seed": 0.5}, TypeError, "seed: .* got 0.5"),
    ({"device": "toaster"}, ValueError, "device: .* got 'toaster'"),
    ({"source": "glyphs"}, TypeError, "source: expected a source, .* or a data set .*, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_bad_arguments_of_episodes(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Episodes(**{"source": coded_source(), **GOOD, **change})


@pytest.mark.parametrize(("index", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_bad_index(index: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="index: expected an integer >= 0"):
        Episodes(coded_source(), **GOOD)[index]


# Images


def test_images_become_exact_fractions_of_255() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1, 1)
    x = Episodes(ClassImages(values), 1, 256, 0, tasks=1)[0].support_x.flatten().sort().values
    assert x[0] == 0 and x[-1] == 1
    torch.testing.assert_close(x, torch.arange(256) / 255, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("images", "names", "error", "message"),
    [
        (np.zeros((2, 2, 1, 4, 4), np.uint8), None, TypeError, "images: .* got ndarray"),
        (torch.zeros(2, 2, 1, 4, 4), None, TypeError, "images: .* got torch.float32"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), None, ValueError, r"got shape \(2, 2, 4, 4\)"),
        (torch.zeros(2, 2, 1, 4, 4, dtype=torch.uint8), ["a"], ValueError, "2 names, got 1"),
    ],
)
def test_bad_class_images(
    images: object, names: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ClassImages(images, names)


def test_expanded_images_can_be_sampled() -> None:
    one = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1, 1)
    x = Episodes(ClassImages(one.expand(6, 4, 1, 2, 2)), 6, 1, 1, tasks=1)[0].support_x
    assert sorted((x[0, :, 0, 1, 1] * 255).round().int().tolist()) == list(range(6))


# Sinusoid


def test_sinusoid_tasks_are_sinusoids_in_range() -> None:
    episode = Sinusoid().sample(np.random.default_rng(0), 200, 1, shots=6, queries=30)
    x = torch.cat([episode.support_x, episode.query_x], 1).double()
    y = torch.cat([episode.support_y, episode.query_y], 1).double()
    assert x.abs().max() <= 5
    # A sin(x - phi) = (A cos phi) sin x - (A sin phi) cos x
    basis = torch.cat([x.sin(), -x.cos()], dim=2)
    a_cos, a_sin = torch.linalg.lstsq(basis, y).solution.squeeze(2).unbind(1)
    fitted = basis @ torch.stack([a_cos, a_sin], dim=1)[:, :, None]
    torch.testing.assert_close(fitted, y, rtol=0, atol=1e-6)
    amplitude, phase = torch.hypot(a_cos, a_sin), torch.atan2(a_sin, a_cos)
    assert 0.1 <= amplitude.min() < 0.3 and 4.8 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.1 and math.pi - 0.1 < phase.max() <= math.pi


def test_the_first_sinusoids_of_seed_0_never_change() -> None:
    episode = Episodes(Sinusoid(), ways=1, shots=2, queries=1, tasks=2)[0]
    expected = (
        [0.02379604, -2.22394419, 4.86066246, -2.46177268],
        [-0.05018380, -0.08417766, 0.06939690, 1.14004326],
        [4.46544313, -3.04949427],
        [-0.12949491, 1.27579558],
    )
    for tensor, values in zip(episode, expected, strict=True):
        assert tensor.flatten().tolist() == pytest.approx(values, rel=1e-6)


def test_sinusoid_ranges_are_honoured() -> None:
    source = Sinusoid(amplitude=(2, 2), phase=(0.5, 0.5), x_range=(1, 2))
    x, y, *_ = source.sample(np.random.default_rng(0), 3, 1, 50, 0)
    assert 1 <= x.min() < x.max() <= 2
    torch.testing.assert_close(y, 2 * torch.sin(x - 0.5))


@pytest.mark.parametrize(("tasks", "queries"), [(0, 4), (3, 0)])
def test_empty_sinusoid_episodes(tasks: int, queries: int) -> None:
    episode = Episodes(Sinusoid(), 1, 5, queries, tasks)[0]
    shapes = [tuple(tensor.shape) for tensor in episode]
    assert shapes == [(tasks, 5, 1)] * 2 + [(tasks, queries, 1)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amplitude": (5, 1)}, ValueError, r"amplitude: .* got \(5.0, 1.0\)"),
        ({"phase": (0, math.inf)}, ValueError, r"phase: .* got \(0.0, inf\)"),
        ({"x_range": 5}, TypeError, "x_range: expected a pair of numbers .* got 5"),
    ],
)
def test_bad_sinusoid_ranges(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sinusoid(**arguments)


def test_sinusoid_has_one_way() -> None:
    with pytest.raises(ValueError, match=r"ways: expected 1, .* got 5"):
        Episodes(Sinusoid(), ways=5, shots=1, queries=1, tasks=1)


def test_a_length_makes_a_stream_finite() -> None:
    options = {"ways": 3, "shots": 1, "queries": 2, "tasks": 2}
    endless, finite = (Episodes(coded_source(), **options, length=n) for n in (None, 5))
    assert len(finite) == 5 and len(list(finite)) == 5
    assert all(map(torch.equal, finite[4], endless[4]))
    assert endless and finite and not Episodes(coded_source(), **options, length=0)
    with pytest.raises(IndexError, match="index: expected below the length 5, got 5"):
        finite[5]
    with pytest.raises(TypeError, match="length: expected a number of episodes"):
        len(endless)
    with pytest.raises(ValueError, match="length: expected an integer >= 0, got -1"):
        Episodes(coded_source(), **options, length=-1)


def test_a_data_loader_reads_episodes() -> None:
    episodes = Episodes(coded_source(), ways=3, shots=1, queries=2, tasks=2, length=5)
    loader = torch.utils.data.DataLoader(episodes, batch_size=None, num_workers=2)
    found = list(loader)
    assert len(found) == len(loader) == 5
    for i, episode in enumerate(found):
        assert isinstance(episode, Episode)
        assert all(map(torch.equal, episode, episodes[i]))


# Ranges of sizes


def sizes_of(episode: Episode) -> list[tuple[int, int, int]]:
    """Ways, shots and queries of each task, of a padded episode that is checked on the way."""
    found = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        ways = int(support_y.max()) + 1
        per_class = []
        for x, y in ((support_x, support_y), (query_x, query_y)):
            each = int((y == 0).sum())
            labels = torch.arange(ways).repeat_interleave(each)
            assert y.tolist() == labels.tolist() + [-1] * (len(y) - len(labels))
            assert not x[len(labels) :].any()
            per_class.append(each)
        found.append((ways, *per_class))
    return found


RANGES = {"ways": (2, 6), "shots": (1, 3), "queries": (0, 2), "tasks": 40}


def test_ranges_give_each_task_its_own_size() -> None:
    episode = Episodes(coded_source(), **RANGES, seed=3)[1]
    sizes = sizes_of(episode)
    for column, (low, high) in zip(zip(*sizes, strict=True), [(2, 6), (1, 3), (0, 2)], strict=True):
        assert set(column) == set(range(low, high + 1))
    assert episode.support_x.shape[1] == max(ways * shots for ways, shots, _ in sizes)
    assert episode.query_x.shape[1] == max(ways * queries for ways, _, queries in sizes)
    assert [t.dtype for t in episode] == [torch.float32, torch.int64] * 2
    for t, (ways, shots, queries) in enumerate(sizes):
        classes, examples = decode(episode.support_x)
        asked_classes, asked = decode(episode.query_x)
        drawn = list(zip(classes[t, : ways * shots].tolist(), examples[t].tolist(), strict=False))
        drawn += zip(asked_classes[t, : ways * queries].tolist(), asked[t].tolist(), strict=False)
        assert len(set(drawn)) == ways * (shots + queries)


def test_sizes_are_uniform() -> None:
    episodes = Episodes(coded_source(), (2, 5), (1, 2), 1, tasks=1000)
    counts = np.bincount([ways for ways, _, _ in sizes_of(episodes[0])], minlength=6)[2:]
    assert ((counts - 250) ** 2 / 250).sum() < 16.27  # chi-squared of 3, p = 0.001


def test_ranges_depend_on_seed_and_index() -> None:
    first, second = (Episodes(coded_source(), **RANGES, seed=3) for _ in range(2))
    assert_same(first[5], second[5])
    assert sizes_of(first[5]) != sizes_of(first[6])
    assert sizes_of(first[5]) != sizes_of(Episodes(coded_source(), **RANGES, seed=4)[5])


def test_the_first_ragged_episode_of_seed_0_never_changes() -> None:
    episode = Episodes(coded_source(), ways=(1, 3), shots=(1, 2), queries=1, tasks=2)[0]
    assert episode.support_y.tolist() == [[0, 1, 2], [0, 0, -1]]
    assert decode(episode.support_x)[0].tolist() == [[0, 2, 11], [7, 7, 0]]


def test_ranges_of_a_fixed_number_of_tasks() -> None:
    """Each task keeps its size and its examples, whatever the episode pads it to."""
    episodes = Episodes(coded_source(), **{**RANGES, "tasks": 5}, num_tasks=10, seed=1)
    seen = [sorted(sizes_of(episodes[i]) + sizes_of(episodes[i + 1])) for i in (0, 2, 4)]
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) > 3


def test_the_origin_of_a_ragged_episode_has_no_padding() -> None:
    episodes = Episodes(coded_source(), **RANGES, seed=3)
    origin, sizes = episodes.origin(2), sizes_of(episodes[2])
    classes, examples = decode(episodes[2].support_x)
    for t, (ways, shots, queries) in enumerate(sizes):
        assert origin.class_names[t] == [
            str(c) for c in classes[t, : ways * shots : shots].tolist()
        ]
        assert len(origin.support[t]) == ways * shots and len(origin.query[t]) == ways * queries
        rows = classes[t] * 8 + examples[t]
        assert origin.support[t] == [str(row) for row in rows[: ways * shots].tolist()]


def test_an_episode_without_tasks_of_ranges() -> None:
    episode = Episodes(coded_source(), **{**RANGES, "tasks": 0})[0]
    assert episode.support_x.shape == (0, 18, 1, 1, 2) and episode.query_y.shape == (0, 12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ways": (0, 3)}, ValueError, "ways: expected an integer >= 1, got 0"),
        ({"ways": (2, 13)}, ValueError, "ways: expected at most the 12 classes .*, got 13"),
        ({"shots": (3, 2)}, ValueError, r"shots: expected a range .* least <= most, got \(3, 2\)"),
        ({"shots": (1, 2, 3)}, ValueError, r"shots: expected a number or a range .*\(1, 2, 3\)"),
        ({"queries": (1, 2.0)}, TypeError, "queries: expected an integer >= 0, got 2.0"),
        ({"shots": (1, 6), "queries": 3}, ValueError, r"at most the 8 examples .* got 6 \+ 3"),
        ({"source": Sinusoid(), "ways": 1, "shots": (1, 2)}, TypeError, "source: .* regression"),
    ],
)
def test_bad_ranges(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Episodes(**{"source": coded_source(), **GOOD, **change})
