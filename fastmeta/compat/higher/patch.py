"""Functional networks, whose parameters are tensors with a graph, as in ``higher.patch``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.vmap import call_twice_differentiable
from fastmeta.learners.gradient._module_copy import copy_module

Device = torch.device | str | None


class Functional(nn.Module):
    """Mixin that ``monkeypatch`` adds to the class of a network: parameters that change by steps.

    The network keeps the parameters of every step, or only of the last step without
    ``track_higher_grads``. Calls use the last ones.
    """

    _history: list[list[Tensor]]
    _places: list[tuple[dict[str, Any], str, int]]
    _tracked: bool

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """The network's own forward.

        Args:
            params: parameters that become the last ones, in the order of ``parameters()``.
        """
        if params is not None:
            self.update_params(params)
        if self._tracked:
            return call_twice_differentiable(super().forward, self, args, kwargs)
        return super().forward(*args, **kwargs)

    def parameters(  # type: ignore[override]
        self, recurse: bool = True, time: int | None = None
    ) -> Iterator[Tensor]:
        """The parameters after ``time`` updates, including frozen ones; None: the last.

        Args:
            recurse: True; parameters by submodule are not supported.
            time: only -1 and 0 without ``track_higher_grads``.

        Raises:
            ValueError: steps that were not kept, or ``recurse=False``.
        """
        if not recurse:
            raise ValueError("recurse: expected True, got False")
        if time not in (None, 0, -1) and not self._tracked:
            raise ValueError(
                f"time: expected 0 or -1, as track_higher_grads=False keeps the last, got {time}"
            )
        if time is not None and not -len(self._history) <= time < len(self._history):
            raise ValueError(f"time: expected at most {len(self._history) - 1} updates, got {time}")
        return iter(self._history[-1 if time is None else time])

    @property
    def fast_params(self) -> list[Tensor]:
        """The parameters after the last update; setting them is an update."""
        return self._history[-1]

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self.update_params(value)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The parameters before the first update.

        Raises:
            ValueError: without ``track_higher_grads`` only the last ones are kept.
        """
        if not self._tracked:
            raise ValueError(
                "init_fast_params: expected all updates, got the last one: "
                "track_higher_grads=False keeps the last"
            )
        return self._history[0]

    @property
    def track_higher_grads(self) -> bool:
        """Whether all updates are kept."""
        return self._tracked

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads: expected a bool, got {value!r}")
        self._tracked = value

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Replace the parameters everywhere in the network.

        Args:
            params: tensors in the order of ``parameters()``.

        Raises:
            ValueError: another number of tensors.
        """
        new = list(params)
        if len(new) != len(self.fast_params):
            raise ValueError(f"params: expected {len(self.fast_params)} tensors, got {len(new)}")
        for table, name, index in self._places:
            table[name] = new[index]
        if not self._tracked:
            self._history.clear()
        self._history.append(new)


def monkeypatch(
    module: nn.Module,
    device: Device = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A functional copy of a network: an instance of its class and of ``Functional``.

    Args:
        module: any module; it is not changed. Its buffers are copied.
        device, copy_initial_weights, track_higher_grads: as for ``innerloop_ctx``.

    Raises:
        ValueError: a module that is ``Functional`` already.

    Example:
        >>> import torch
        >>> import fastmeta.compat.higher as higher
        >>> fnet = higher.monkeypatch(torch.nn.Linear(3, 1))
        >>> fnet(torch.ones(1, 3), params=[torch.ones(1, 3), torch.ones(1)])
        tensor([[4.]])
    """
    if isinstance(module, Functional):
        raise ValueError(
            f"module: expected one that is not functional, got {type(module).__name__}"
        )

    def parameter(p: Tensor) -> Tensor:
        copy = p.clone()
        if copy_initial_weights:
            copy = copy.detach().requires_grad_(p.requires_grad)
        return _to(copy, device)

    def buffer(b: Tensor) -> Tensor:
        return _to(b.detach().clone(), device)

    fmodule: Any = copy_module(module, parameter, buffer)
    fmodule.__class__ = _functional(type(fmodule))  # type: ignore[arg-type]
    start = list(nn.Module.parameters(fmodule))
    index = {p: i for i, p in enumerate(start)}
    fmodule._places = [
        (m._parameters, name, index[p])
        for m in fmodule.modules()
        for name, p in m._parameters.items()
        if p is not None
    ]
    fmodule._history = [start]
    fmodule._tracked = track_higher_grads
    return fmodule


def _to(tensor: Tensor, device: Device) -> Tensor:
    return tensor if device is None else tensor.to(device)


@cache
def _functional(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Functional{kind.__name__}", (Functional, kind), {})
