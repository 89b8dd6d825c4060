"""Labels are checked once: a check of the same tensor again would stop the host for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.ops.task_program import COMPILED
from tests.cuda_emulation import emulator
from tests.helpers.program_checks import Setting

X = torch.arange(12.0).view(1, 6, 2)


def labels(*values: int) -> Tensor:
    return torch.tensor([values or (0, 1, 2, 2, 1, 0)])


def checks_of(*targets: Tensor, classes: int = 3) -> int:
    """How many checks are launched while each of the labels is used."""
    with emulator.launches() as launches:
        for y in targets:
            fm.prototypes(X, y, classes)
    return sum(launch.kernel == "label_range_kernel" for launch in launches)


def test_the_same_labels_are_checked_once():
    y = labels()
    assert checks_of(y, y, y) == 1
    assert checks_of(y, labels(), y) == 1


def test_a_backward_pass_does_not_check_again():
    y, x = labels(), X.clone().requires_grad_()
    with emulator.launches() as launches:
        prototypes = fm.prototypes(x, y, 3)
        fm.prototype_loss(x, y, prototypes).backward()
        head = fm.linear_head(x, y, torch.zeros(3, 2), torch.zeros(3), lr=0.1, steps=1)
        sum(part.sum() for part in head).backward()
    kernels = [launch.kernel for launch in launches]
    assert kernels.count("label_range_kernel") == 1 and len(kernels) > 6


def test_classes_of_queries_are_looked_for_once_and_after_a_change():
    x, y, of_support = X.clone().requires_grad_(), labels(0, 1), labels(0, 1, 1, 0)

    def loss() -> Tensor:
        return fm.matching_loss(x[:, :2], y, x[:, 2:], of_support)

    with emulator.launches() as launches:
        loss().backward()
        loss().backward()
    assert [launch.kernel for launch in launches].count("label_range_kernel") == 2
    of_support.fill_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"query_labels\[0, 1\] is 1, expected a class with"):
            loss()
    of_support[0, 3] = 1
    loss()
    with pytest.raises(ValueError, match="other than the query itself"):
        fm.matching_loss(x[:, :2], y, x[:, :2], y, exclude_self=True)


def test_a_change_in_place_is_seen():
    y = labels()
    assert checks_of(y) == 1
    y[0, 3] = 1
    assert checks_of(y, y) == 1
    y[0, 3] = 3
    with pytest.raises(ValueError, match=r"labels\[0, 3\] is 3"):
        fm.prototypes(X, y, 3)
    with pytest.raises(ValueError, match=r"labels\[0, 3\] is 3"):  # nor is a failure forgotten
        fm.prototypes(X, y, 3)
    y.sub_(1).clamp_(min=0)
    assert checks_of(y) == 1


def test_other_memory_behind_a_tensor_is_seen():
    y = labels()
    assert checks_of(y) == 1
    y.data = labels()
    assert checks_of(y) == 1
    y.data = labels(5, 5, 5, 5, 5, 5)
    with pytest.raises(ValueError, match=r"labels\[0, 0\] is 5"):
        fm.prototypes(X, y, 3)


def test_another_tensor_in_the_same_memory_is_checked():
    """As an allocator gives freed memory out again: address, version and size are the same."""
    memory = bytearray(6 * 8)
    first = torch.frombuffer(memory, dtype=torch.int64).view(1, 6)
    assert checks_of(first) == 1
    address, version = first.data_ptr(), first._version
    del first
    memory[0] = 9
    second = torch.frombuffer(memory, dtype=torch.int64).view(1, 6)
    assert (second.data_ptr(), second._version) == (address, version)
    with pytest.raises(ValueError, match=r"labels\[0, 0\] is 9"):
        fm.prototypes(X, second, 3)


def test_many_tensors_at_one_address_are_told_apart():
    """The memory of the tensor's own record is not reused either while it is known."""
    memory = torch.zeros(1, 6, dtype=torch.int64)
    assert [checks_of(memory.detach()) for _ in range(100)] == [1] * 100


def test_a_smaller_range_is_checked():
    y = labels()
    assert checks_of(y) == 1 and checks_of(y, classes=4) == 1 and checks_of(y) == 0
    with pytest.raises(ValueError, match="is 2, expected 0 <= label < 2"):
        fm.prototypes(X, y, 2)


def test_a_label_that_a_program_ignores_is_none_of_another_op():
    code, theta, frozen, x, y, *rest = Setting(
        "linear", "cross_entropy", "cpu", torch.float32, tasks=1, support=6, queries=6
    ).arguments("gradient")
    classes = int(y.max()) + 1
    y = y.clone()
    y[0, 0] = -100  # cross_entropy's own
    COMPILED.gradient(code, theta, frozen, x, y, *rest)
    with pytest.raises(ValueError, match=r"labels\[0, 0\] is -100"):
        fm.prototypes(X, y, classes)


def test_labels_with_absent_examples_are_checked_once():
    y, x = labels(0, -1, 2, 2, -1, 0), X.clone()
    x[0, 1] = x[0, 4] = torch.nan
    assert checks_of(y, y, y) == 1
    query, prototypes = x.requires_grad_(), torch.zeros(1, 3, 2)
    for _ in range(2):  # what is known of the labels is that some are absent
        fm.prototype_loss(query, y, prototypes).backward()
        assert (query.grad[0, [1, 4]] == 0).all() and query.grad.isfinite().all()
    assert checks_of(y) == 0
    y[0, 1] = y[0, 4] = 1
    assert checks_of(y, y) == 1
    assert fm.prototypes(x, y, 3).isnan().any()


def test_a_capture_leaves_absent_examples_out():
    y, x = labels(0, -1, 2, 2, -1, 0), X.clone()
    x[0, 1] = 1e30  # its distances and outputs overflow
    start = torch.zeros(3, 2)

    def values() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), start.clone().requires_grad_()]
        head = fm.linear_head(leaves[0], y, leaves[1] + 1, lr=0.1, steps=2)[0]
        means = fm.prototypes(leaves[0], y, 3)
        loss = fm.prototype_loss(leaves[0], y, means) + head.square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = values()
    with emulator.capturing():
        captured = values()
    for a, e in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
    assert not captured[1][0, [1, 4]].any()


def test_writes_in_inference_mode_are_not_counted_so_labels_are_checked_again():
    with torch.inference_mode():
        y = labels()
        assert checks_of(y, y) == 2
        y[0, 0] = 7
        with pytest.raises(ValueError, match=r"labels\[0, 0\] is 7"):
            fm.prototypes(X, y, 3)


def test_a_capture_neither_checks_nor_remembers():
    y = labels()
    with emulator.capturing():
        assert checks_of(y, y) == 0
    assert checks_of(y) == 1


def test_a_replay_checks_labels_once():
    """`check_labels` is what runs before each replay of a CUDA graph."""
    arguments = Setting("linear", "cross_entropy", "cpu", torch.float32).arguments("meta_gradient")
    code, support_y, query_y = arguments[0], arguments[5], arguments[7]
    assert support_y.dtype == query_y.dtype == torch.int64
    with emulator.launches() as launches:
        for _ in range(3):
            COMPILED.check_labels(code, support_y, query_y)
    assert [launch.kernel for launch in launches] == ["label_range_kernel"] * 2
