"""A network whose parameters are tensors of a graph, step after step, as in ``higher.patch``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.learners.gradient._module_copy import copy_module

Device = torch.device | str | None


class Functional(nn.Module):
    """Mixin that ``monkeypatch`` adds to the class of a network: parameters that change by steps.

    The network keeps the parameters of every step (only the last without
    ``track_higher_grads``), and calls use the last ones.
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
        return super().forward(*args, **kwargs)

    def parameters(  # type: ignore[override]
        self, recurse: bool = True, time: int | None = None
    ) -> Iterator[Tensor]:
        """The parameters after ``time`` updates, frozen ones among them; None: the last.

        Args:
            recurse: True; there are no parameters by submodule.
            time: only -1 and 0 without ``track_higher_grads``.

        Raises:
            ValueError: steps that were not kept, or ``recurse=False``.
        """
        if not recurse:
            raise ValueError("recurse: expected True, as parameters belong to the whole network")
        if time not in (None, 0, -1) and not self._tracked:
            raise ValueError(
                "time: expected 0 or -1, as track_higher_grads=False keeps only the last step, "
                f"got {time}"
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
            ValueError: without ``track_higher_grads``, which keeps only the last.
        """
        if not self._tracked:
            raise ValueError("init_fast_params: track_higher_grads=False keeps only the last")
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
        """Make these the parameters, everywhere in the network.

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
    """A copy of a network that is of its class and ``Functional``.

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
        raise ValueError("module: expected one that is not functional already")

    def parameter(p: Tensor) -> Tensor:
        copy = p.clone()
        if copy_initial_weights:
            copy = copy.detach().requires_grad_(p.requires_grad)
        return _moved(copy, device)

    def buffer(b: Tensor) -> Tensor:
        return _moved(b.detach().clone(), device)

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


def _moved(tensor: Tensor, device: Device) -> Tensor:
    return tensor if device is None else tensor.to(device)


@cache
def _functional(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Functional{kind.__name__}", (Functional, kind), {})
