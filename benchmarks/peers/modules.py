"""Workloads in PyTorch: the module, its parameters, its data, and how results are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from benchmarks.common.networks import MLP, ContextMLP, LoraMLP, Network
from benchmarks.common.workloads import Arrays
from benchmarks.peers.step import Missing, Problem, Step, nothing

Params = dict[str, Tensor]
TASKS = ("support_x", "support_y", "query_x", "query_y")
LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def _block(inputs: int, hidden: int) -> list[nn.Module]:
    """Without running statistics: vmap could not write them, and MAML does not use them."""
    convolution = nn.Conv2d(inputs, hidden, 3, padding=1)
    norm = nn.BatchNorm2d(hidden, track_running_stats=False)
    return [convolution, norm, nn.ReLU(), nn.MaxPool2d(2)]


class _Context(nn.Module):
    def __init__(self, network: ContextMLP) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(network.context))
        self.body = nn.Sequential(*_layers(network.body))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cat([x, self.context.expand(x.shape[0], -1)], -1))


class _LoRA(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_up(self.lora_down(x))


def _layers(network: Network) -> list[nn.Module]:
    if isinstance(network, ContextMLP):
        return [_Context(network)]
    if isinstance(network, LoraMLP):
        pairs = itertools.pairwise(network.sizes)
        return [layer for i, o in pairs for layer in (_LoRA(i, o, network.rank), nn.ReLU())][:-1]
    if isinstance(network, MLP):
        pairs = itertools.pairwise(network.sizes)
        return [layer for i, o in pairs for layer in (nn.Linear(i, o), nn.ReLU())][:-1]
    blocks = [layer for c, _ in network.blocks() for layer in _block(c, network.hidden)]
    return [*blocks, nn.Flatten(), nn.Linear(network.features, network.ways)]


class TorchProblem:
    """A problem as tensors on its device: `theta`, and the rest of the numbers in `data`."""

    def __init__(self, problem: Problem) -> None:
        if problem.device == "cuda" and not torch.cuda.is_available():
            raise Missing("torch finds no CUDA device")
        self.device = torch.device(problem.device)
        self.workload = problem.workload
        self.loss = LOSSES[problem.workload.loss]
        self.dtype = getattr(torch, problem.dtype)
        tensors = {name: self._tensor(array) for name, array in problem.arrays.items()}
        self.theta = tensors.pop("theta")
        self.data = tensors
        self.module = nn.Sequential(*_layers(self.workload.network)).to(self.device, self.dtype)
        self._shapes = {name: p.shape for name, p in self.module.named_parameters()}

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def split(self, flat: Tensor) -> Params:
        """[..., P] -> the parameters [..., *shape] by name."""
        pieces = flat.split([shape.numel() for shape in self._shapes.values()], -1)
        named = zip(self._shapes.items(), pieces, strict=True)
        return {name: p.unflatten(-1, shape).contiguous() for (name, shape), p in named}

    def loaded(self) -> nn.Module:
        """The module with theta [P] as its parameters."""
        self.module.load_state_dict(self.split(self.theta))
        return self.module

    def loss_of(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one task."""
        return self.loss(functional_call(self.module, params, (x,)), y)

    def step(self, run: Callable[[], Any], read: Callable[[Any], Arrays], **facts: str) -> Step:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else nothing
        return Step(run, read, wait, {**precision(), **facts})


def precision() -> dict[str, str]:
    """Version of torch, and what it may do to float32 products."""
    return {
        "torch": torch.__version__,
        "float32 products in torch": torch.get_float32_matmul_precision(),
        "TF32 on CUDA": "allowed" if torch.backends.cuda.matmul.allow_tf32 else "off",
        "threads of torch": str(torch.get_num_threads()),
    }


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([_array(tensor).ravel() for tensor in tensors])


def read_meta(result: tuple[Tensor, Sequence[Tensor]]) -> Arrays:
    """Read the meta-loss and its gradients in the order of the parameters."""
    loss, gradients = result
    return {"loss": _array(loss), "gradient": _flat(gradients)}


def read_product(result: Sequence[Tensor]) -> Arrays:
    """Read the products [T, *shape] of all parameters as one [T, P]."""
    rows = [_array(tensor.flatten(1)) for tensor in result]
    return {"product": np.concatenate(rows, 1)}


def over_tasks(function: Callable[..., Any], tasks: int, in_dims: Any = 0) -> Callable[..., Any]:
    """Map a function over tasks; a single task runs without vmap, which costs time."""
    if tasks > 1:
        return vmap(function, in_dims=in_dims)

    def single(*inputs: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)
        pairs = zip(inputs, dims, strict=True)
        only = (x if dim is None else tree_map(lambda t: t[0], x) for x, dim in pairs)
        return tree_map(lambda t: t.unsqueeze(0), function(*only))

    return single
