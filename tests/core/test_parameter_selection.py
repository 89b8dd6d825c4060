"""Which parameters names, patterns, modules and predicates select."""

from __future__ import annotations

import pytest
from torch import nn

from fastmeta.core.parameter_selection import selected_names, shared_parameters


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    net[1].weight.requires_grad_(False)
    return net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (lambda net: "0.weight", ("0.weight",)),
        (lambda net: "*bias", ("0.bias", "1.bias", "2.bias")),
        (lambda net: "?.weight", ("0.weight", "2.weight")),
        (lambda net: net[2], ("2.weight", "2.bias")),
        (lambda net: ["2.bias", net[0]], ("0.weight", "0.bias", "2.bias")),
        (lambda net: lambda name, p: p.ndim == 2, ("0.weight", "2.weight")),
        (lambda net: "1.*", ("1.bias",)),
    ],
)
def test_what_is_selected(select, names):
    net = network()
    assert selected_names(net, select(net)) == names


@pytest.mark.parametrize("everything", [None, "*", lambda name, p: True])
def test_a_selection_of_everything_is_none(everything):
    assert selected_names(network(), everything) is None


def test_the_others_are_shared():
    net = network()
    assert list(shared_parameters(net, ("2.bias",))) == ["0.weight", "0.bias", "1.bias", "2.weight"]
    assert shared_parameters(net, None) == {}


def test_tied_weights_are_selected_in_both_places_or_in_neither():
    assert selected_names(Tied(), ["first.*", "second.weight"]) == ("first.weight", "first.bias")
    assert selected_names(Tied(), "*bias") == ("first.bias", "second.bias")
    net = Tied()
    assert selected_names(net, net.second) == ("first.weight", "second.bias")
    with pytest.raises(ValueError, match=r"'first\.weight' is selected and 'second.weight' is not"):
        selected_names(Tied(), "first.*")


@pytest.mark.parametrize(
    ("adapt", "error", "message"),
    [
        ("3.*", ValueError, r"'3.\*' matches no trainable parameter; the trainable ones are \['0"),
        ([], ValueError, "expected at least one name, pattern, module or predicate"),
        (["0.*", "gone"], ValueError, "'gone' matches no trainable parameter"),
        ("1.weight", ValueError, r"only parameters with requires_grad=False: \['1.weight'\]"),
        (nn.Linear(3, 4), ValueError, "the Linear given has no trainable parameter of the model"),
        (lambda name, p: False, ValueError, "the predicate is true for no trainable parameter"),
        (3, TypeError, "expected names, patterns, modules or predicates, got a int"),
    ],
)
def test_what_selects_nothing_raises(adapt, error, message):
    with pytest.raises(error, match=message):
        selected_names(network(), adapt)
