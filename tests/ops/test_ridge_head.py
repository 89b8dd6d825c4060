"""fm.ridge_head: the minimum, both forms, leave-one-out outputs, absence, derivatives, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm
from tests.helpers.assertions import BACKENDS, assert_near
from tests.helpers.case import CaseFactory

T, S, N = 2, 7, 3
WIDTHS = (1, 4, 12)
SIZES_AND_FORMS = list(itertools.product(WIDTHS, ("primal", "dual")))
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with fm.use_backend(request.param):
        yield request.param


def normal_equations(x, y, l2, weight, center, bias):
    """W [T, N, D] and b [T, N]: the intercept is a feature, always 1, without a penalty."""
    tasks, examples, features = x.shape
    rows = torch.cat([x, x.new_ones(tasks, examples, 1)], 2) if bias else x
    penalty = torch.ones_like(rows[0, 0])
    penalty[features:] = 0
    system = (weight.unsqueeze(2) * rows).mT @ rows + l2[:, None, None] * penalty.diag()
    sides = (weight.unsqueeze(2) * rows).mT @ y
    sides = sides + torch.cat(
        [l2[:, None, None] * center.mT, torch.zeros_like(sides[:, features:])], 1
    )
    solution = torch.linalg.solve(system, sides)
    return solution[:, :features].mT, solution[:, features] if bias else None


@pytest.mark.parametrize("form", ("primal", "dual"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("s", "d"), ((6, 4), (5, 9), (1, 3), (4, 1)))
def test_it_solves_the_normal_equations_and_differentiates_them_twice(form, bias, s, d):
    make = CaseFactory()
    x, y, center = make.randn(3, s + 1, d), make.randn(3, s + 1, 2), make.randn(3, 2, d)
    l2, weight = make.randn(3).abs() + 0.1, make.randn(3, s + 1).abs()
    weight[:, -1] = 0
    leaves = [z.requires_grad_() for z in (x, y, l2, weight, center)]
    ours = fm.ridge_head(x, y, l2, weight=weight, center=center, bias=bias, form=form)
    theirs = normal_equations(*leaves, bias)
    outputs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    for a, b in outputs:
        assert_near(a, b, 1e-12)
    upstream = [torch.randn_like(b) for _, b in outputs]
    first = [
        torch.autograd.grad([pair[i] for pair in outputs], leaves, upstream, create_graph=True)
        for i in (0, 1)
    ]
    for a, b in zip(*first, strict=True):
        assert_near(a, b, 1e-9)
    along = [torch.randn_like(z) for z in leaves]
    second = [torch.autograd.grad(gradient, leaves, along) for gradient in first]
    for a, b in zip(*second, strict=True):
        assert_near(a, b, 1e-6)


def draw(width: int, examples: int = S, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(T, examples, width),
        "targets": normal(T, examples, N),
        "weight": normal(T, examples).abs(),
        "center": normal(T, N, width),
    }


def fitted(width: int, **options) -> tuple[dict, torch.Tensor, torch.Tensor]:
    inputs = draw(width)
    return inputs, *fm.ridge_head(**inputs, **options)


@pytest.mark.parametrize("width, form", SIZES_AND_FORMS)
def test_the_gradient_vanishes_at_the_head(width, form):
    inputs, weight, bias = fitted(width, l2=0.3, form=form)
    weight.requires_grad_(), bias.requires_grad_()
    error = fm.task_linear(inputs["x"], weight, bias) - inputs["targets"]
    loss = (inputs["weight"].unsqueeze(2) * error.square()).sum()
    loss = loss + 0.3 * (weight - inputs["center"]).square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-11, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_dual_equals_primal(width, bias):
    primal, dual = (
        fm.ridge_head(**draw(width), l2=0.3, bias=bias, form=form) for form in ("primal", "dual")
    )
    torch.testing.assert_close(primal[0], dual[0], rtol=1e-11, atol=1e-11)
    assert (primal[1] is None) == (not bias)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("l2", [0.0, 1e-12])
def test_it_ends_at_least_squares(width, l2):
    """The solution of least length, if there are many."""
    inputs = draw(width)
    weight, _ = fm.ridge_head(inputs["x"], inputs["targets"], l2, bias=False)
    expected = torch.linalg.lstsq(inputs["x"], inputs["targets"], driver="gelsd").solution.mT
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)
    weight, bias = fm.ridge_head(inputs["x"], inputs["targets"], l2)
    mean_x, mean_y = (inputs[name].mean(1, keepdim=True) for name in ("x", "targets"))
    centred = torch.linalg.lstsq(inputs["x"] - mean_x, inputs["targets"] - mean_y, driver="gelsd")
    torch.testing.assert_close(weight, centred.solution.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, (mean_y - mean_x @ weight.mT).squeeze(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width, form", SIZES_AND_FORMS)
def test_leave_one_out_equals_as_many_trainings(width, form, bias):
    inputs = draw(width)
    inputs["weight"][0, 2] = 0
    options = {"l2": 0.3, "bias": bias, "form": form}
    outputs = fm.ridge_head(**inputs, **options, loo=True)
    for s in range(S):
        others = [i for i in range(S) if i != s]
        rest = {name: z if name == "center" else z[:, others] for name, z in inputs.items()}
        retrained = fm.task_linear(inputs["x"][:, s : s + 1], *fm.ridge_head(**rest, **options))
        torch.testing.assert_close(outputs[:, s : s + 1], retrained, **TIGHT)


@pytest.mark.parametrize("bias", [True, False])
def test_leave_one_out_of_an_interpolation(bias):
    """With l2 = 0 residuals are 0, and so is what divides them."""
    inputs = draw(12)
    outputs = fm.ridge_head(inputs["x"], inputs["targets"], 0.0, bias=bias, loo=True)
    others = list(range(1, S))
    head = fm.ridge_head(inputs["x"][:, others], inputs["targets"][:, others], 0.0, bias=bias)
    torch.testing.assert_close(outputs[:, :1], fm.task_linear(inputs["x"][:, :1], *head), **TIGHT)


@pytest.mark.parametrize("l2", [0.3, 0.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width, form", [(4, "primal"), (12, "dual")])
def test_weight_0_is_absence(width, form, bias, l2):
    inputs = draw(width)
    inputs["weight"][:, [1, 4]] = 0
    kept = [0, 2, 3, 5, 6]
    rest = {name: z if name == "center" else z[:, kept] for name, z in inputs.items()}
    options = {"l2": l2, "bias": bias, "form": form}
    for with_zeros, without in zip(
        fm.ridge_head(**inputs, **options), fm.ridge_head(**rest, **options), strict=True
    ):
        torch.testing.assert_close(with_zeros, without, **TIGHT)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_an_absent_label_is_absence(form):
    x, labels = draw(5)["x"], torch.tensor([[0, 1, -1, 2, 0, -1, 1], [1, 0, 2, 2, 1, 0, 0]])
    x[0, 2] = torch.nan
    weight, bias = fm.ridge_head(x, labels, 0.5, form=form)
    kept = [0, 1, 3, 4, 6]
    alone = fm.ridge_head(x[0, kept], labels[0, kept], 0.5, form=form)
    torch.testing.assert_close(weight[0], alone[0], **TIGHT)
    torch.testing.assert_close(bias[0], alone[1], **TIGHT)
    one_hot = torch.nn.functional.one_hot(labels[1], N).double()
    torch.testing.assert_close(weight[1], fm.ridge_head(x[1], one_hot, 0.5, form=form)[0], **TIGHT)


@pytest.mark.parametrize("loo", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width, form", [(3, "primal"), (6, "dual")])
def test_derivatives(width, form, bias, loo):
    inputs = draw(width, examples=4)
    inputs["weight"][0, 1] = 0  # the derivative there is of one side, and exact
    l2 = torch.tensor([0.4, 0.7], dtype=torch.float64)
    leaves = [*inputs.values(), l2]

    def call(x, targets, weight, center, l2):
        # Finite differences would leave the allowed range at weight 0.
        found = fm.ridge_head(
            x, targets, l2, weight=weight, center=center, bias=bias, form=form, loo=loo
        )
        return tuple(z for z in found if z is not None) if isinstance(found, tuple) else found

    shifted = [z.clone() for z in leaves]
    shifted[2][0, 1] = 1e-3
    shifted = tuple(z.requires_grad_() for z in shifted)
    assert gradcheck(call, shifted, eps=1e-6, atol=1e-5)
    assert gradgradcheck(call, shifted, eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_the_derivative_at_weight_0(form):
    """What a first bit of weight does to the head, by a difference to one side."""
    inputs = draw(6)
    inputs["weight"][0, 3] = 0
    weights = inputs["weight"].requires_grad_()
    head = fm.ridge_head(**inputs, l2=0.5, form=form)[0]
    (gradient,) = torch.autograd.grad(head.sum(), weights)
    more = {**inputs, "weight": weights.detach().clone()}
    more["weight"][0, 3] = 1e-7
    slope = (fm.ridge_head(**more, l2=0.5, form=form)[0].sum() - head.sum()) / 1e-7
    torch.testing.assert_close(gradient[0, 3], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loo", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_one_example(bias, loo):
    x, y = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    found = fm.ridge_head(x, y, 1.0, bias=bias, loo=loo)
    if loo:
        assert found.tolist() == [[0.0]]
        assert fm.ridge_head(x, y, 1.0, center=torch.ones(1, 1), loo=True).tolist() == [[2.0]]
    elif bias:
        assert found[0].tolist() == [[0.0]] and found[1].tolist() == [3.0]
    else:
        torch.testing.assert_close(found[0], torch.tensor([[1.2]]))


@pytest.mark.parametrize("form", ["auto", "primal", "dual"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape, form):
    tasks, examples, width = shape
    x, y = torch.zeros(shape), torch.ones(tasks, examples, 2)
    weight, bias = fm.ridge_head(x, y, 1.0, form=form)
    assert weight.shape == (tasks, 2, width) and bias.shape == (tasks, 2)
    assert bias.tolist() == [[1.0 if examples else 0.0] * 2] * tasks
    assert fm.ridge_head(x, y, 1.0, form=form, loo=True).shape == y.shape


def test_half_types_and_strides():
    inputs = {name: z.float() for name, z in draw(12).items()}
    half = {name: z.bfloat16() for name, z in inputs.items()}
    weight, bias = fm.ridge_head(**half, l2=0.3)
    assert weight.dtype == bias.dtype == torch.bfloat16
    wide, _ = fm.ridge_head(**{name: z.float() for name, z in half.items()}, l2=0.3)
    torch.testing.assert_close(weight, wide.bfloat16())
    strided = inputs["x"].mT.contiguous().mT
    torch.testing.assert_close(
        fm.ridge_head(**{**inputs, "x": strided}, l2=0.3), fm.ridge_head(**inputs, l2=0.3)
    )


def test_l2_of_each_task_and_shared_center():
    inputs = draw(5)
    inputs["center"] = inputs["center"][0]
    l2 = torch.tensor([0.1, 2.0], dtype=torch.float64)
    weight, _ = fm.ridge_head(**inputs, l2=l2)
    for t in range(T):
        one = {name: z if name == "center" else z[t] for name, z in inputs.items()}
        torch.testing.assert_close(weight[t], fm.ridge_head(**one, l2=float(l2[t]))[0], **TIGHT)


def test_it_compiles():
    inputs = draw(5)
    compiled = torch.compile(
        lambda **z: fm.ridge_head(**z, l2=0.3), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**inputs), fm.ridge_head(**inputs, l2=0.3))


def test_vmap():
    inputs = draw(5)
    names = list(inputs)
    found = torch.vmap(lambda *z: fm.ridge_head(**dict(zip(names, z, strict=True)), l2=0.3)[0])(
        *inputs.values()
    )
    torch.testing.assert_close(found, fm.ridge_head(**inputs, l2=0.3)[0])


@pytest.mark.parametrize("form, width", [("dual", 9), ("primal", 2)])
def test_equal_rows_without_l2_are_refused(form, width):
    x = draw(width)["x"]
    if form == "dual":
        x[1, 3] = x[1, 5]
    else:
        x[1, :, 1] = 2 * x[1, :, 0]
    with pytest.raises(ValueError, match=r"l2: expected a larger number, .* task 1 .* got 0"):
        fm.ridge_head(x, draw(width)["targets"], 0.0, form=form)
    assert fm.ridge_head(x, draw(width)["targets"], 0.1, form=form)[0].isfinite().all()


LABELS = torch.tensor([0, 1, 2])
X = torch.zeros(3, 4)
WRONG = [
    ({"x": X.long()}, TypeError, "x: expected a floating"),
    ({"x": torch.zeros(3)}, ValueError, r"x: expected shape \[T, S, D\]"),
    ({"targets": LABELS.int()}, TypeError, "targets: expected dtype torch.int64"),
    ({"targets": [0, 1, 2]}, TypeError, "targets: expected a tensor, got list"),
    ({"targets": LABELS[:2]}, ValueError, "targets: expected shape"),
    ({"targets": torch.zeros(2, 4)}, ValueError, "targets: expected shape"),
    ({"targets": torch.zeros(3, 4).double()}, TypeError, "targets: expected dtype"),
    ({"num_classes": 2}, ValueError, r"targets\[0, 2\] is 2, expected 0 <= label < 2"),
    ({"targets": LABELS - 2, "num_classes": 3}, ValueError, r"targets\[0, 0\] is -2"),
    ({"num_classes": 0}, ValueError, "num_classes: expected at least 1"),
    ({"l2": -1.0}, ValueError, "l2: expected at least 0, got -1"),
    ({"l2": torch.tensor(-1.0)}, ValueError, "l2: expected at least 0, got -1"),
    ({"l2": torch.ones(2)}, ValueError, r"l2: expected a number or \[T\]"),
    ({"l2": "1"}, TypeError, "l2: expected a number"),
    ({"weight": torch.ones(2)}, ValueError, "weight: expected shape"),
    ({"weight": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "weight: expected at least 0"),
    ({"center": torch.zeros(3, 5)}, ValueError, "center: expected shape"),
    ({"form": "both"}, ValueError, "form: expected one of auto, primal, dual"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        fm.ridge_head(**{"x": X, "targets": LABELS, "l2": 1.0, **wrong})
