"""The task program on both of its ways: a block takes a whole task, or every step is a launch."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmeta.ops.task_program import COMPILED, NAMES, reference
from tests.cuda_emulation import emulator
from tests.cuda_emulation.checks import fresh, rounded_to_tf32
from tests.helpers.program_checks import STEP_SIZES, Setting, assert_same, check
from tests.helpers.programs import Raw

# Bytes of shared memory: enough for any small task, or for none.
WAYS = {"block": 227 * 1024, "grid": 1024}
LAYERS = ["relu", "gelu_tanh", "softplus", "layer_norm", "deep", "residual", "tied"]


@pytest.fixture(params=WAYS)
def way(request):
    with emulator.shared_memory(WAYS[request.param]):
        yield request.param


def setting(name: str, loss: str = "cross_entropy", **options) -> Setting:
    return Setting(name, loss, "cpu", **{"tasks": 2, "support": 3, "queries": 2, **options})


@pytest.mark.parametrize("op", NAMES)
def test_every_barrier_of_an_op(op, way):
    setting("deep", support=9).check(op)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name, way):
    setting(name, dtype=torch.float32, steps=1).check("meta_gradient")


@pytest.mark.parametrize("loss", ["ignore_index", "label_smoothing", "mse", "bce", "huber", "l1"])
def test_every_loss(loss, way):
    for op in ("gradient", "hvp"):
        setting("tanh", loss).check(op)
    setting("tanh", loss).check("products", gauss_newton=True)


@pytest.mark.parametrize("loss", ["ignore_index", "cross_entropy_sum", "mse", "bce", "huber", "l1"])
def test_weights_of_examples(loss, way):
    s = setting("tanh", loss, weighs=True)
    for op in ("gradient", "hvp"):
        s.check(op)
    s.check("products", gauss_newton=True)


@pytest.mark.parametrize("op", ["adapt", "adapt_backward", "meta_gradient"])
def test_weights_of_examples_in_steps(op, way):
    setting("layer_norm", dtype=torch.float32, weighs=True).check(op, keep=op == "adapt_backward")


@pytest.mark.parametrize("op", ["gradient", "hvp", "meta_gradient"])
@pytest.mark.parametrize("weighs", [False, True])
def test_absent_examples(weighs, op, way):
    s = setting("tanh", "ignore_index", tasks=3, weighs=weighs)
    s.mark_absent()
    s.check(op)
    s.data.support_y[0, 0] = -2
    with pytest.raises(ValueError, match=r"expected labels in 0..2, .* got -2"):
        COMPILED.gradient(*s.arguments("gradient"))


def test_absent_examples_before_a_batch_norm_are_refused_and_never_counted():
    s = setting("batch_norm", tasks=3)
    expected = COMPILED.gradient(*s.arguments("gradient"))[0]
    s.data.support_y[1, 0] = -1
    with pytest.raises(ValueError, match=r"expected labels in 0..2, .* got -1"):
        COMPILED.gradient(*s.arguments("gradient"))
    with emulator.capturing():  # labels cannot be read
        loss, _, grads, _ = COMPILED.gradient(*s.arguments("gradient"))
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(loss[::2], expected[::2]) and grads[1].isnan().any()


@pytest.mark.parametrize("form", STEP_SIZES)
def test_every_form_of_the_step_size(form, way):
    s = setting("silu", "mse", per_task=form == "per_step")
    s.lr = 0.1 + 0.05 * s.random(*STEP_SIZES[form](s.steps, s.tasks, s.parameters))
    for first_order in (False, True):
        s.check("meta_gradient", first_order=first_order, keep=True, weights=(0.5, 0.5))


def arguments(
    sizes: tuple[int, ...], tasks: int, examples: int, dtype: torch.dtype, steps: int = 1
) -> tuple:
    """Of meta_gradient, for a plain network on random labels."""
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ELU())]
    raw = Raw.of(nn.Sequential(*layers[:-1]).to(dtype=dtype), F.cross_entropy, sizes[:1])
    x = torch.randn(tasks, examples, sizes[0], dtype=dtype)
    y = torch.randint(sizes[-1], (tasks, examples))
    lr = torch.full((1, 1, 1), 0.1, dtype=dtype)
    return *raw, lr, x, y, x, y, [], steps, False, True, True, True, True, True


# multiprocessors: with many, tiles are too few for them, and sums are split
TILES = {
    "few_rows": ((40, 9, 3), 5, 2),
    "few_rows_in_splits": ((300, 9, 3), 5, 99),
    "some_rows": ((20, 70, 3), 20, 99),
    "some_rows_in_splits": ((150, 30, 3), 20, 99),
    "many_rows": ((20, 70, 3), 40, 1),
    "unaligned": ((13, 67, 3), 35, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TILES)
def test_tiles_of_large_products(name, dtype):
    sizes, examples, multiprocessors = TILES[name]
    with ExitStack() as stack:
        stack.enter_context(emulator.shared_memory(WAYS["grid"]))
        stack.enter_context(emulator.multiprocessors(multiprocessors))
        check("meta_gradient", *arguments(sizes, 1, examples, dtype))


@pytest.fixture(params=["allow_tf32", "fp32_precision"])
def tf32_products(request):
    """Allows them, by either name of the setting."""
    matmul, value = torch.backends.cuda.matmul, {"allow_tf32": True, "fp32_precision": "tf32"}
    before = getattr(matmul, request.param)
    yield lambda: setattr(matmul, request.param, value[request.param])
    setattr(matmul, request.param, before)


# Of the examples that a tile has, the large and the small one are for tensor cores.
TENSOR_TILES = {"large": (40, 1), "small": (20, 1), "small_in_splits": (20, 99), "skinny": (16, 1)}


@pytest.mark.parametrize("name", TENSOR_TILES)
def test_linear_layers_are_tf32_where_the_setting_allows_it(name, tf32_products):
    """With both operands rounded, the reference gives the same in float64."""
    examples, multiprocessors = TENSOR_TILES[name]
    code, theta, frozen, _, x, *_ = arguments((130, 70), 1, examples, torch.float32)
    theta[130 * 70 :] = 0  # the bias, which is not rounded
    with ExitStack() as stack:
        stack.enter_context(emulator.shared_memory(WAYS["grid"]))
        stack.enter_context(emulator.multiprocessors(multiprocessors))
        ieee = COMPILED.forward(code, theta, frozen, x)
        tf32_products()
        actual = COMPILED.forward(code, theta, frozen, x)
    if name != "skinny":
        assert not torch.equal(actual, ieee)
        theta, x = rounded_to_tf32(theta), rounded_to_tf32(x)
    expected = reference.forward(code, theta.double(), frozen.double(), x.double())
    assert_same(actual, expected, 2e-6)


def test_all_products_of_a_meta_gradient_in_tf32_are_near_those_in_float32(tf32_products):
    args = arguments((40, 70, 33), 1, 40, torch.float32)
    with emulator.shared_memory(WAYS["grid"]):
        expected = COMPILED.meta_gradient(*args)
        tf32_products()
        actual = COMPILED.meta_gradient(*args)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e, 1e-2)
        assert not torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(8, 40, 3), (7, 41, 3), (12, 4, 4)], ids=str)
def test_tiles_of_a_block(sizes, dtype):
    check("meta_gradient", *arguments(sizes, 1, 12, dtype))


def test_a_small_meta_step_is_one_kernel_and_one_sum():
    args = arguments((3, 8, 2), 4, 5, torch.float32)[:-4]
    with emulator.capturing(), emulator.launches() as launches:
        COMPILED.meta_gradient(*args, True, False, False, False)
    assert [launch.blocks for launch in launches] == [4, -(-50 // 32)]


@pytest.mark.parametrize("steps", [1, 4, 9, 40])
def test_lists_of_steps_of_any_length(steps):
    args = arguments((2, 2, 2), 1, 1, torch.float64, steps)
    with emulator.capturing(), emulator.launches() as launches:
        check("meta_gradient", *args)
    assert (len(launches) == 2) == (steps < 40)  # the steps, and the sum for the step size


def test_steps_that_do_not_fit_are_made_again():
    args = arguments((3, 8, 2), 1, 9, torch.float64, 3)
    with emulator.capturing(), emulator.launches() as launches:
        kept = COMPILED.meta_gradient(*args)
    too_little = launches[0].shared_bytes - 1
    with emulator.capturing(), emulator.shared_memory(too_little), emulator.launches() as again:
        made_again = COMPILED.meta_gradient(*args)
    assert len(launches) == len(again) == 2
    for a, b in zip(kept, made_again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_tasks_are_done_in_chunks_where_they_take_much_memory():
    with emulator.shared_memory(WAYS["grid"]):
        with emulator.launches() as one:
            check("gradient", *setting("relu", tasks=1).arguments("gradient"))
        with emulator.launches() as many:
            check("gradient", *setting("relu", tasks=70).arguments("gradient"))
    assert len(many) > 2 * len(one)


def test_work_goes_to_the_current_stream_of_the_tensors_device(way):
    args = setting("relu").arguments("meta_gradient")
    with emulator.devices(current=0, of_tensors=1), emulator.current_stream(device=1, stream=1):
        with emulator.launches() as launches:
            COMPILED.meta_gradient(*args)
        assert emulator.current_device() == 0
    assert {(launch.device, launch.stream) for launch in launches} == {(1, 1)}


def test_every_launch_is_checked(way):
    args = setting("relu", steps=1).arguments("meta_gradient")
    with emulator.launches() as launches:
        expected = COMPILED.meta_gradient(*args)
    for after in range(0, len(launches), 1 if way == "block" else 5):
        message = r"^(task_program|(support|query)_y): too many resources requested"
        with emulator.failing_launch(after), pytest.raises(RuntimeError, match=message):
            COMPILED.meta_gradient(*fresh(args))
    for a, e in zip(COMPILED.meta_gradient(*args), expected, strict=True):
        assert torch.equal(a, e)


def test_while_capturing_a_wrong_label_changes_no_other_task(way):
    s = setting("relu", tasks=3)
    expected = COMPILED.gradient(*s.arguments("gradient"))
    s.data.support_y[1, 0] = 7
    with emulator.capturing():
        actual = COMPILED.gradient(*s.arguments("gradient"))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a[::2], e[::2])


def test_labels_are_checked_by_themselves_and_not_at_all_while_capturing():
    s = setting("relu", tasks=3)
    labels = s.arguments("meta_gradient")[0], s.data.support_y, s.data.query_y
    assert COMPILED.check_labels(*labels) is None
    for name in ("support_y", "query_y"):
        y = getattr(s.data, name)
        before, y[1, 0] = y[1, 0].item(), 7
        with pytest.raises(ValueError, match=f"{name}: expected labels in 0..2, .* got 7"):
            COMPILED.check_labels(*labels)
        with emulator.capturing(), emulator.launches() as launches:
            COMPILED.check_labels(*labels)
        assert not launches
        y[1, 0] = before
