"""Measures of `benchmarks.gpu.ops`: for each op its inputs, its contenders and its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import fastmeta as fm
from benchmarks.gpu.measure import OURS, Contender, Inputs, Measure, Sizes, in_torch
from benchmarks.gpu.programs import image_programs, programs
from benchmarks.ops import matching
from benchmarks.ops.prototype_loss import composed
from fastmeta.ops.inner_update import inner_update_backward


def unit_rows(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows of norm about 1, as embeddings of a network in training have."""
    x = torch.randn(shape, generator=generator, device=generator.device)
    return x.mul_(shape[-1] ** -0.5).to(dtype)


def differentiated(value: Callable[..., torch.Tensor], *places: int) -> Contender:
    """Compute the value and its gradient to the inputs at `places`, for an upstream of ones."""

    def run(*inputs: torch.Tensor) -> Inputs:
        leaves = [x.detach().requires_grad_(i in places) for i, x in enumerate(inputs)]
        out = value(*leaves)
        gradient = torch.autograd.grad(out, [leaves[i] for i in places], torch.ones_like(out))
        return out.detach(), *gradient

    return run


def as_tuple(value: Callable[..., torch.Tensor]) -> Contender:
    return lambda *inputs: (value(*inputs),)


def loss_inputs(dtype: torch.dtype, t: int, q: int, n: int, d: int) -> Callable:
    def draw(generator: torch.Generator) -> Inputs:
        labels = torch.randint(n, (t, q), generator=generator, device=generator.device)
        query, prototypes = (unit_rows(generator, dtype, t, rows, d) for rows in (q, n))
        return query, labels, prototypes

    return draw


def loss_of_each(query: torch.Tensor, labels: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return fm.prototype_loss(query, labels, y, reduction="none")


def composed_of_each(query: torch.Tensor, labels: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return composed(query, labels, y, reduction="none").view(labels.shape)


def in_chunks(value: Callable[..., torch.Tensor], chunk: int) -> Callable[..., torch.Tensor]:
    """The loss of each query, `chunk` queries at a time."""

    def run(query: torch.Tensor, labels: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = zip(query.split(chunk, 1), labels.split(chunk, 1), strict=True)
        return torch.cat([value(*part, y) for part in parts], 1)

    return run


def small_losses(sizes: Sizes) -> Iterator[Measure]:
    """proto_small one call after the other, one call a graph, and many calls a graph."""
    contenders = {
        "forward": {OURS: as_tuple(loss_of_each), "composition": as_tuple(composed_of_each)},
        "forward + backward": {
            OURS: differentiated(fm.prototype_loss, 0, 2),
            "composition": differentiated(composed, 0, 2),
        },
    }
    for t in sizes.small_tasks:
        for what, rivals in contenders.items():
            for calls, in_graph in ((sizes.graph, False), (1, True), (sizes.graph, True)):
                # In a graph, against the usual composition only.
                plain = {} if in_graph else {"torch backend": in_torch(rivals[OURS])}
                yield Measure(
                    "prototype_loss",
                    f"proto_small, T = {t}",
                    what,
                    torch.float32,
                    {**rivals, **plain},
                    loss_inputs(torch.float32, t, *sizes.small),
                    sizes.rounds,
                    calls,
                    in_graph,
                )


def big_losses(sizes: Sizes) -> Iterator[Measure]:
    """proto_big, against the composition a chunk of queries at a time."""
    q, n, d = sizes.big

    def part(inputs: Inputs) -> Inputs:
        query, labels, prototypes = inputs
        return query[:, : sizes.big_checked], labels[:, : sizes.big_checked], prototypes

    forward = {
        OURS: as_tuple(loss_of_each),
        "composition": as_tuple(in_chunks(composed_of_each, sizes.big_chunk)),
    }
    with_backward = {OURS: differentiated(fm.prototype_loss, 0, 2)}
    for what, contenders, dtype, products in (
        ("forward", forward, torch.bfloat16, 1),
        ("forward", forward, torch.float32, 1),
        ("forward + backward", with_backward, torch.float32, 3),
    ):
        yield Measure(
            "prototype_loss",
            "proto_big",
            what,
            dtype,
            contenders,
            loss_inputs(dtype, 1, q, n, d),
            sizes.long_rounds,
            calls=1,
            checked=part,
            flops=2 * products * q * n * d,
            memory=True,
        )


def matching_losses(sizes: Sizes) -> Iterator[Measure]:
    """Softmax over the supports of five classes, against a mask and two logsumexp."""
    q, n, d = sizes.small

    def draw(t: int) -> Callable[[torch.Generator], Inputs]:
        def inputs(generator: torch.Generator) -> Inputs:
            device = generator.device
            query, support = (unit_rows(generator, torch.float32, t, k, d) for k in (q, n))
            ways = min(5, n)
            labels = torch.randint(ways, (t, q), generator=generator, device=device)
            of_support = torch.arange(n, device=device).remainder(ways).repeat(t, 1)
            return query, labels, support, of_support

        return inputs

    def loss_by(loss: matching.Loss) -> Contender:
        def value(*inputs: torch.Tensor) -> torch.Tensor:
            return loss(matching.Episode(*inputs), "cosine", 10.0)

        return differentiated(value, 0, 2)

    for t in sizes.small_tasks:
        yield Measure(
            "matching_loss",
            f"proto_small, T = {t}",
            "forward + backward",
            torch.float32,
            {OURS: loss_by(matching.ours), "composition": loss_by(matching.exact)},
            draw(t),
            sizes.rounds,
            sizes.graph,
        )


def updates(sizes: Sizes) -> Iterator[Measure]:
    def descend(params: torch.Tensor, grads: torch.Tensor, lr: torch.Tensor) -> Inputs:
        return (fm.inner_update(params, grads, lr),)

    def draw(t: int, p: int) -> Callable[[torch.Generator], Inputs]:
        def inputs(generator: torch.Generator) -> Inputs:
            device = generator.device
            rows = (torch.randn(t, p, generator=generator, device=device) for _ in range(2))
            return *rows, torch.full((1, 1), 0.1, device=device)

        return inputs

    for t, p in sizes.updates:
        for what, ours in (("forward", descend), ("backward", inner_update_backward)):
            yield Measure(
                "inner_update",
                f"{t} x {p}",
                what,
                torch.float32,
                {OURS: ours, "torch backend": in_torch(ours)},
                draw(t, p),
                sizes.rounds,
                calls=4,
                moved=12 * t * p,
            )


def means(sizes: Sizes) -> Iterator[Measure]:
    t, s, n, d = sizes.support

    def draw(generator: torch.Generator) -> Inputs:
        labels = torch.arange(s, device=generator.device).remainder(n).expand(t, s).contiguous()
        return unit_rows(generator, torch.float32, t, s, d), labels

    def value(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fm.prototypes(x, labels, n)

    forward = 4 * t * d * (s + n)
    for what, ours, moved in (
        ("forward", as_tuple(value), forward),
        ("forward + backward", differentiated(value, 0), 2 * forward),
    ):
        contenders = {OURS: ours, "torch backend": in_torch(ours)}
        name = f"T = {t}, S = {s}, N = {n}, D = {d}"
        yield Measure(
            *("prototypes", name, what, torch.float32, contenders, draw, sizes.rounds),
            calls=4,
            moved=moved,
        )


def distances(sizes: Sizes) -> Iterator[Measure]:
    t, q, n, d = sizes.pairs

    def draw(generator: torch.Generator) -> Inputs:
        return tuple(unit_rows(generator, torch.float32, t, rows, d) for rows in (q, n))

    for what, ours, products in (
        ("forward", as_tuple(fm.pairwise_distance), 1),
        ("forward + backward", differentiated(fm.pairwise_distance, 0, 1), 3),
    ):
        contenders = {OURS: ours, "torch backend": in_torch(ours)}
        name = f"T = {t}, Q = {q}, N = {n}, D = {d}"
        yield Measure(
            *("pairwise_distance", name, what, torch.float32, contenders, draw, sizes.long_rounds),
            calls=2,
            flops=2 * products * t * q * n * d,
        )


def searches(sizes: Sizes) -> Iterator[Measure]:
    """The distances of the nearest of the same rows."""
    t, q, n, d = sizes.pairs

    def draw(generator: torch.Generator) -> Inputs:
        return tuple(unit_rows(generator, torch.float32, t, rows, d) for rows in (q, n))

    ours = as_tuple(lambda x, y: fm.nearest(x, y)[0])
    contenders = {OURS: ours, "torch backend": in_torch(ours)}
    name = f"T = {t}, Q = {q}, N = {n}, D = {d}"
    yield Measure(
        *("nearest", name, "forward", torch.float32, contenders, draw, sizes.long_rounds),
        calls=2,
        flops=2 * t * q * n * d,
    )


def convolutions(sizes: Sizes) -> Iterator[Measure]:
    """A layer of Conv4-64, 3 x 3 with padding 1."""
    t, b, channels, size = sizes.images

    def draw(dtype: torch.dtype) -> Callable[[torch.Generator], Inputs]:
        def inputs(generator: torch.Generator) -> Inputs:
            shapes = (t, b, channels, size, size), (t, channels, channels, 3, 3)
            x, w = (torch.randn(s, generator=generator, device=generator.device) for s in shapes)
            return x.to(dtype), (w / (9 * channels) ** 0.5).to(dtype)

        return inputs

    def value(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fm.task_conv2d(x, weight, padding=1)

    for what, ours, products in (
        ("forward", as_tuple(value), 1),
        ("forward + backward", differentiated(value, 0, 1), 3),
    ):
        contenders = {OURS: ours, "torch backend": in_torch(ours)}
        name = f"T = {t}, B = {b}, {channels} channels, {size} x {size}"
        for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            yield Measure(
                *("task_conv2d", name, what, dtype, contenders, draw(dtype), sizes.rounds),
                calls=2,
                flops=2 * products * t * b * 9 * channels**2 * size**2,
                tf32=tf32,
            )


def norms(sizes: Sizes) -> Iterator[Measure]:
    """Of the outputs of the same layer."""
    t, b, channels, size = sizes.images

    def draw(generator: torch.Generator) -> Inputs:
        images, rows = (t, b, channels, size, size), (t, channels)
        device = generator.device
        shapes = images, rows, rows, images
        return tuple(torch.randn(s, generator=generator, device=device) for s in shapes)

    def with_gradients(*inputs: torch.Tensor) -> Inputs:
        *leaves, upstream = (x.detach().requires_grad_() for x in inputs)
        out = fm.task_batch_norm(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    name = f"T = {t}, B = {b}, {channels} channels, {size} x {size}"
    contenders = {OURS: with_gradients, "torch backend": in_torch(with_gradients)}
    what, dtype = "forward + backward", torch.float32
    yield Measure("task_batch_norm", name, what, dtype, contenders, draw, sizes.rounds, calls=2)


def activations(sizes: Sizes) -> Iterator[Measure]:
    """Mish of the outputs of the same layer, with the second derivative."""
    t, b, channels, size = sizes.images

    def draw(generator: torch.Generator) -> Inputs:
        shape = (t, b, channels, size, size)
        return tuple(torch.randn(shape, generator=generator, device=generator.device) for _ in "xg")

    def by(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Inputs]:
        def second(x: torch.Tensor, upstream: torch.Tensor) -> Inputs:
            x = x.detach().requires_grad_()
            slope = torch.autograd.grad(function(x), x, upstream, create_graph=True)[0]
            return slope.detach(), *torch.autograd.grad(slope, x, upstream)

        return second

    name = f"mish, T = {t}, B = {b}, {channels} channels, {size} x {size}"
    contenders = {OURS: by(lambda x: fm.activation(x, "mish")), "torch": by(F.mish)}
    what, dtype = "second derivative", torch.float32
    yield Measure("activation", name, what, dtype, contenders, draw, sizes.rounds, calls=3)


def networks_of_pairs(sizes: Sizes) -> Iterator[Measure]:
    """Scores of proto_small's pairs, and pooled pairs of its queries' and classes' maps."""
    (q, n, d), t, rounds = sizes.small, sizes.small_tasks[-1], sizes.rounds
    channels = sizes.images[2]
    rows = (t, q, d), (t, n, d), (d,)
    maps = (1, q, channels, 5, 5), (1, n, channels, 5, 5)

    def drawn(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
        return lambda generator: tuple(unit_rows(generator, torch.float32, *s) for s in shapes)

    def scores_by_split(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(2) + y.unsqueeze(1)).relu() @ weight

    def pool_by_pairs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool2d((x.unsqueeze(2) + y.unsqueeze(1)).flatten(0, 2).relu(), 2)
        return pooled.view(1, q, n, channels, 2, 2)

    what, dtype = "forward + backward", torch.float32
    scores = {
        OURS: differentiated(fm.pair_scores, 0, 1, 2),
        "composition": differentiated(scores_by_split, 0, 1, 2),
    }
    pools = {
        OURS: differentiated(fm.pair_pool, 0, 1),
        "composition": differentiated(pool_by_pairs, 0, 1),
    }
    of_rows, of_maps = f"T = {t}, Q = {q}, N = {n}, H = {d}", f"Q = {q}, N = {n}, 5 x 5"
    yield Measure("pair_scores", of_rows, what, dtype, scores, drawn(*rows), rounds, calls=2)
    yield Measure("pair_pool", of_maps, what, dtype, pools, drawn(*maps), rounds, calls=2)


def heads(sizes: Sizes) -> Iterator[Measure]:
    """anil: the inner steps, the loss on the queries, and its gradients."""
    t, steps, s, q, n, d = sizes.head

    def draw(generator: torch.Generator) -> Inputs:
        device = generator.device
        support, query = (unit_rows(generator, torch.float32, t, rows, d) for rows in (s, q))
        labels = (torch.arange(rows, device=device).remainder(n).repeat(t, 1) for rows in (s, q))
        weight = torch.randn(n, d, generator=generator, device=device)
        return support, query, weight, torch.zeros(n, device=device), *labels

    def value(
        support: torch.Tensor, query: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
        labels: torch.Tensor, query_labels: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        head = fm.linear_head(support, labels, weight, bias, lr=0.1, steps=steps)
        outputs = fm.task_linear(query, *head)
        return F.cross_entropy(outputs.flatten(0, 1), query_labels.flatten())

    ours = differentiated(value, 0, 1, 2, 3)
    contenders = {OURS: ours, "torch backend": in_torch(ours)}
    for calls, in_graph in ((sizes.graph, False), (sizes.graph, True)):
        yield Measure(
            *("linear_head", "anil", "meta-step", torch.float32, contenders, draw, sizes.rounds),
            calls=calls,
            in_graph=in_graph,
        )


def ridges(sizes: Sizes) -> Iterator[Measure]:
    """R2-D2's head on the features of the same episodes, with its gradients."""
    t, _, s, _, n, d = sizes.head

    def draw(generator: torch.Generator) -> Inputs:
        targets = torch.eye(n, device=generator.device).repeat(t, s // n, 1)
        return unit_rows(generator, torch.float32, t, s, d), targets

    def value(support: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head, intercept = fm.ridge_head(support, targets, 0.1)
        return head.square().sum() + intercept.square().sum()

    ours = differentiated(value, 0, 1)
    contenders = {OURS: ours, "torch backend": in_torch(ours)}
    name, what = f"T = {t}, S = {s}, N = {n}, D = {d}", "forward + backward"
    yield Measure("ridge_head", name, what, torch.float32, contenders, draw, sizes.rounds, calls=4)


def all_measures(sizes: Sizes) -> Iterator[Measure]:
    """All measures, those that decide about most first: time may not suffice for all."""
    in_a_block = [workload for workload in sizes.programs if workload.loss == "mse"]
    in_launches = [workload for workload in sizes.programs if workload.loss != "mse"]
    yield from programs(in_a_block, sizes.rounds, sizes.graph)
    yield from heads(sizes)
    yield from small_losses(sizes)
    yield from matching_losses(sizes)
    yield from image_programs(sizes.image_programs, sizes.rounds)
    yield from programs(in_launches, sizes.rounds, sizes.graph)
    yield from updates(sizes)
    yield from big_losses(sizes)
    yield from convolutions(sizes)
    yield from norms(sizes)
    yield from activations(sizes)
    yield from ridges(sizes)
    yield from networks_of_pairs(sizes)
    yield from means(sizes)
    yield from distances(sizes)
    yield from searches(sizes)
