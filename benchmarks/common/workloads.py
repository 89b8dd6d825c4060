"""The workloads that fastmeta and its peers are measured on: sizes, numbers, operation counts.

A new one is one line of `WORKLOADS`. Everything here is NumPy, so that a worker of any framework
can read it.

Operations. The count is of the operations that the algorithm needs, the same for every contender:
the products of linear and convolutional layers, a multiplication and an addition being two.
With f the operations of one forward pass on the examples,

- a gradient takes 3 f: outputs, gradient of the inputs, gradient of the weights;
- a Hessian-vector product 6 f where activations and gradients are at hand, since each of those
  three passes becomes a sum of two products; and 8 f from nothing: outputs and input gradients
  besides.

The input of the first layer needs no gradient and has no tangent: for this layer the counts are
2 f, 2 f and 3 f. A meta-step of T tasks and K inner steps on S examples, with Q queries, is

    T (K (gradient of S + product at hand of S) + gradient of Q)

Where some of the parameters are adapted ("some"), a gradient in the inner loop takes 2 f, as no
layer's own weight needs one, and a product 4 f; on the queries it takes 3 f if the layers are
learned, else 2 f. The thin matrices and the context are not counted.

A head that is adapted on the features of a body ("head") is one linear layer whose inputs get
gradients: then a gradient on the queries takes 3 f, and a product 4 f, two of them for the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.common.networks import (
    MLP,
    ContextMLP,
    Conv4,
    LoraMLP,
    Network,
    draw_parameters,
    parameter_count,
)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """`kind` "meta": theta [P] and tasks -> meta-loss [], its gradient [P].

    "hvp": theta and vector [T, P] and a batch of S examples a task -> products [T, P].
    "head": as "meta" on features, with gradients also to the features of support and queries.
    "some": as "meta", but some of the parameters are adapted and some learned: the gradient is of
        the learned ones.
    "iteration": as "meta", with the drawing of the tasks and a step of Adam.
    """

    name: str
    network: Network
    loss: str  # "mse" or "cross_entropy"
    tasks: int
    support: int  # S
    queries: int = 0  # Q
    steps: int = 0  # K
    lr: float = 0.0
    kind: str = "meta"
    default: bool = True  # measured where none is named

    def __str__(self) -> str:
        sizes = f"T = {self.tasks}, "
        if self.kind != "hvp":
            sizes += f"K = {self.steps}, S = {self.support}, Q = {self.queries}"
        else:
            sizes += f"batch {self.support}"
        return f"{self.network}, {sizes}"

    @property
    def flops(self) -> int:
        """Count the operations of one meta-step, or of one Hessian-vector product of every task."""
        first, *others = self.network.layer_flops()
        rest = sum(others)
        gradient = 2 * first + 3 * rest
        if self.kind == "hvp":
            return self.tasks * self.support * (3 * first + 8 * rest)
        if self.kind == "head":
            inner = self.steps * self.support * 6 * first
            return self.tasks * (inner + self.queries * 3 * first)
        if self.kind == "some":
            every = first + rest
            of_queries = 3 if all(self.network.learned) else 2
            return self.tasks * every * (self.steps * self.support * 6 + self.queries * of_queries)
        product = 2 * first + 6 * rest
        inner = self.steps * self.support * (gradient + product)
        return self.tasks * (inner + self.queries * gradient)

    @property
    def parameters(self) -> int:
        return parameter_count(self.network)


def _meta(name: str, network: Network, loss: str, lr: float, *sizes: int, **more) -> Workload:
    """`sizes` are T, K, S, Q."""
    tasks, steps, support, queries = sizes
    return Workload(name, network, loss, tasks, support, queries, steps, lr, **more)


_SINE = MLP((1, 40, 40, 1))
_OMNI = MLP((784, 256, 128, 64, 64, 5))
_HVP = MLP((784, 512, 512, 10))
_LATER = {"default": False}

_ALL = (
    _meta("sin1_t1", _SINE, "mse", 0.01, 1, 1, 10, 10),
    _meta("sin1", _SINE, "mse", 0.01, 25, 1, 10, 10),
    _meta("sin5", _SINE, "mse", 0.01, 25, 5, 10, 10),
    _meta("sin_big", _SINE, "mse", 0.01, 4096, 5, 10, 10),
    _meta("omni_mlp", _OMNI, "cross_entropy", 0.4, 32, 1, 5, 75),
    Workload("hvp_mlp_t1", _HVP, "cross_entropy", 1, 128, kind="hvp"),
    Workload("hvp_mlp_t32", _HVP, "cross_entropy", 32, 128, kind="hvp"),
    _meta("anil", MLP((1600, 5)), "cross_entropy", 0.1, 32, 5, 25, 75, kind="head", **_LATER),
    _meta("anil_640", MLP((640, 5)), "cross_entropy", 0.1, 32, 5, 25, 75, kind="head", **_LATER),
    _meta("sin1_iteration", _SINE, "mse", 0.01, 25, 1, 10, 10, kind="iteration", **_LATER),
    _meta("sin5_iteration", _SINE, "mse", 0.01, 25, 5, 10, 10, kind="iteration", **_LATER),
    _meta(
        "cavia1", ContextMLP((1, 40, 40, 1), 5), "mse", 1.0, 25, 1, 10, 10, kind="some", **_LATER
    ),
    _meta(
        "cavia5", ContextMLP((1, 40, 40, 1), 5), "mse", 1.0, 25, 5, 10, 10, kind="some", **_LATER
    ),
    _meta(
        "lora",
        LoraMLP((784, 512, 512, 10), 4),
        "cross_entropy",
        0.1,
        16,
        3,
        50,
        50,
        kind="some",
        **_LATER,
    ),
    _meta("omni_conv1", Conv4(64, 5), "cross_entropy", 0.4, 32, 1, 5, 75, **_LATER),
    _meta("omni_conv5", Conv4(64, 5), "cross_entropy", 0.4, 8, 5, 5, 75, **_LATER),
    _meta("omni_paper", Conv4(64, 5), "cross_entropy", 0.4, 32, 1, 5, 5, **_LATER),
    _meta("omni_20w", Conv4(64, 20), "cross_entropy", 0.1, 16, 5, 20, 20, **_LATER),
    _meta("mini_conv5", Conv4(32, 5, 3, 84), "cross_entropy", 0.01, 4, 5, 5, 75, **_LATER),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


def _sinusoids(tasks: int, counts: tuple[int, ...], generator: np.random.Generator) -> list:
    """Draw x and y = A sin(x - phi), [T, B, 1], for each count B: MAML's regression tasks."""
    amplitude, phase = (generator.uniform(low, high, (tasks, 1, 1)) for low, high in _SINE_RANGES)
    arrays = []
    for count in counts:
        x = generator.uniform(-5, 5, (tasks, count, 1))
        arrays += [x.astype(np.float32), (amplitude * np.sin(x - phase)).astype(np.float32)]
    return arrays


_SINE_RANGES = ((0.1, 5.0), (0.0, np.pi))


def _images(
    network: Network, tasks: int, counts: tuple[int, ...], generator: np.random.Generator
) -> list:
    """Draw random images [T, B, ...] and labels [T, B], class by class, for each count B."""
    arrays = []
    for count in counts:
        labels = np.arange(count) * network.outputs // count
        x = generator.random((tasks, count, *network.input_shape), dtype=np.float32)
        arrays += [x, np.tile(labels, (tasks, 1))]
    return arrays


def draw(workload: Workload, seed: int = 0) -> Arrays:
    """Draw the numbers of a workload, float32 and int64, the same for the same seed."""
    generator = np.random.default_rng(seed)
    tasks, network = workload.tasks, workload.network
    if workload.kind == "hvp":
        theta = np.stack([draw_parameters(network, generator) for _ in range(tasks)])
        vector = generator.standard_normal(theta.shape, dtype=np.float32)
        x, y = _images(network, tasks, (workload.support,), generator)
        return {"theta": theta, "vector": vector, "x": x, "y": y}
    theta = draw_parameters(network, generator)
    if workload.kind == "iteration":
        return {"theta": theta, **draw_episode(workload)}
    return {"theta": theta, **_tasks(workload, generator)}


def draw_episode(workload: Workload) -> Arrays:
    """Draw the tasks of an iteration, the same at each call."""
    return _tasks(workload, np.random.default_rng(1))


def _tasks(workload: Workload, generator: np.random.Generator) -> Arrays:
    counts = (workload.support, workload.queries)
    if workload.loss == "mse":
        data = _sinusoids(workload.tasks, counts, generator)
    else:
        data = _images(workload.network, workload.tasks, counts, generator)
    names = ("support_x", "support_y", "query_x", "query_y")
    return dict(zip(names, data, strict=True))
