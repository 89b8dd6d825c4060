"""A kept trace is not used after a variable or a class attribute that it read has changed."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.program import names
from fastmeta.engines.program.lowering import Lowering, Program
from tests.helpers.networks import relative_error

FLAG = False
SETTINGS = {"tanh": False}
COUNTS = {"calls": 0}
UNRELATED = 0


class Config:
    flag = False

    def __init__(self) -> None:
        self.inner = types.SimpleNamespace(flag=False)

    def is_set(self) -> bool:
        return self.inner.flag


CONFIG = Config()
MODULE = types.ModuleType("settings_of_a_user")
MODULE.flag = False  # type: ignore[attr-defined]


def activation(x: Tensor) -> Tensor:
    return torch.tanh(x) if FLAG else torch.relu(x)


def chosen(tanh: bool, x: Tensor) -> Tensor:
    return torch.tanh(x) if tanh else torch.relu(x)


class Base(nn.Module):
    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.body(x)))


class OfGlobal(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(FLAG, x)


class OfFunction(Base):
    def activation(self, x: Tensor) -> Tensor:
        return activation(x)


class OfDict(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(SETTINGS["tanh"], x)


class OfObject(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(CONFIG.inner.flag, x)


class OfMethod(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(CONFIG.is_set(), x)


class OfClass(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(Config.flag, x)


class OfModule(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(MODULE.flag, x)


class OfItself(Base):
    def activation(self, x: Tensor) -> Tensor:
        return chosen(self.flag, x)


class Counting(Base):
    def activation(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return chosen(COUNTS["calls"] > 3, x)


HERE = globals()
FLIPS: dict[type[Base], Callable[[pytest.MonkeyPatch], None]] = {
    OfGlobal: lambda patch: patch.setitem(HERE, "FLAG", True),
    OfFunction: lambda patch: patch.setitem(HERE, "FLAG", True),
    OfDict: lambda patch: patch.setitem(SETTINGS, "tanh", True),
    OfObject: lambda patch: patch.setattr(CONFIG.inner, "flag", True),
    OfMethod: lambda patch: patch.setattr(CONFIG, "inner", types.SimpleNamespace(flag=True)),
    OfClass: lambda patch: patch.setattr(Config, "flag", True),
    OfModule: lambda patch: patch.setattr(MODULE, "flag", True),
    OfItself: lambda patch: patch.setattr(Base, "flag", True),
}


def batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, q = (torch.randn(4, 6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    y, z = (torch.randint(2, (4, 6), generator=generator) for _ in range(2))
    return x, y, q, z


def grads(learner: fm.MAML) -> Tensor:
    return learner.meta_gradient(*batch()).grads


def of_variable() -> tuple[Base, Callable[[], None]]:
    """A network that reads a variable of this function, and a function that flips it."""
    flag = False

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()

        def activation(self, x: Tensor) -> Tensor:
            return chosen(flag, x)

    def flip() -> None:
        nonlocal flag
        flag = True

    return Net(), flip


def of_list_in_a_lambda() -> tuple[Base, Callable[[], None]]:
    flags = [False]

    class Net(Base):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = [function]

        def activation(self, x: Tensor) -> Tensor:
            return self.function[0](x)

    def flip() -> None:
        flags[0] = True

    return Net(lambda x: chosen(flags[0], x)), flip


def of_two_with_one_code() -> tuple[Base, Callable[[], None]]:
    """The variable of the network's own forward, and of no other with the same code."""
    first, flip_first = of_variable()
    second, _ = of_variable()
    grads(fm.MAML(second.double(), 0.1, engine="program"))
    return first, flip_first


@pytest.mark.parametrize("calls", [1, 4], ids=["first call", "fast path"])
@pytest.mark.parametrize("make", [of_variable, of_list_in_a_lambda, of_two_with_one_code])
def test_a_variable_of_an_enclosing_function(make, calls):
    torch.manual_seed(0)
    net, flip = make()
    learner = fm.MAML(net.double(), 0.1, engine="program")
    before = [grads(learner) for _ in range(calls)][-1]
    flip()
    expected = grads(fm.MAML(net, 0.1, engine="functional"))
    assert relative_error(grads(learner), expected) < 1e-12
    assert relative_error(before, expected) > 1e-3


@pytest.mark.parametrize("make", [of_variable, of_list_in_a_lambda])
def test_a_trace_is_kept_while_variables_are_unchanged(make):
    net, flip = make()
    lowering = Lowering(net, F.cross_entropy)
    assert isinstance(lowering.program((3,)), Program)
    assert lowering.current(net, F.cross_entropy)
    flip()
    assert not lowering.current(net, F.cross_entropy)


@pytest.mark.parametrize("calls", [1, 4], ids=["first call", "fast path"])
@pytest.mark.parametrize("kind", FLIPS, ids=lambda kind: kind.__name__)
def test_a_flag_that_is_flipped_between_calls(kind, calls, monkeypatch):
    torch.manual_seed(0)
    net = kind().double()
    learner = fm.MAML(net, 0.1, engine="program")
    before = [grads(learner) for _ in range(calls)][-1]
    FLIPS[kind](monkeypatch)
    expected = grads(fm.MAML(net, 0.1, engine="functional"))
    assert relative_error(grads(learner), expected) < 1e-12
    assert relative_error(before, expected) > 1e-3


def test_a_function_that_is_replaced(monkeypatch):
    net = OfFunction().double()
    learner = fm.MAML(net, 0.1, engine="program")
    grads(learner)
    monkeypatch.setitem(HERE, "activation", torch.sigmoid)
    expected = grads(fm.MAML(net, 0.1, engine="functional"))
    assert relative_error(grads(learner), expected) < 1e-12


def test_a_forward_that_changes_what_it_reads_has_no_program(monkeypatch):
    monkeypatch.setitem(COUNTS, "calls", 0)
    reason = "the forward of model changes globals that it reads"
    lowering = Lowering(Counting(), F.cross_entropy)
    assert lowering.program((3,)) == reason
    assert lowering.current(lowering._module, F.cross_entropy)  # or each call would trace anew


@pytest.mark.parametrize("kind", FLIPS, ids=lambda kind: kind.__name__)
def test_a_trace_is_kept_while_nothing_that_it_reads_changes(kind, monkeypatch):
    net = kind()
    lowering = Lowering(net, F.cross_entropy)
    assert isinstance(lowering.program((3,)), Program)
    monkeypatch.setitem(HERE, "UNRELATED", 1)
    monkeypatch.setattr(CONFIG, "unrelated", 1, raising=False)
    assert lowering.current(net, F.cross_entropy)


def test_a_package_whose_name_begins_as_torchs_is_the_users():
    folder = Path(torch.__file__).parent
    assert names._is_library_file(str(folder / "nn" / "functional.py"))
    assert not names._is_library_file(f"{folder}vision/ops.py")


def test_layers_read_no_names_that_a_repeated_call_would_compare():
    for net, shape in (
        (fm.models.MLP([3, 4, 2]), (3,)),
        (fm.models.Conv4(8, 5, 1, 28), (1, 28, 28)),
    ):
        lowering = Lowering(net, F.cross_entropy)
        assert isinstance(lowering.program(shape), Program)
        assert len(lowering.names) == 0
