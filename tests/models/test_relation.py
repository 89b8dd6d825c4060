"""Relation modules: all pairs at once are the concatenations one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastmeta.distributed import share_batch_statistics
from fastmeta.models import RelationEncoder, RelationMLP, RelationModule
from fastmeta.models.relation import concatenated_scores

BOUNDS = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str
)


def maps(device: str, dtype: torch.dtype, channels: int = 4, size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, count, channels, size, size, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for count in (7, 4)
    ]


def module(device: str, dtype: torch.dtype, size: int = 5) -> RelationModule:
    torch.manual_seed(1)
    found = RelationModule(4, image_size=size).to(device, dtype)
    for m in found.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
    return found


@BOUNDS
@pytest.mark.parametrize("size", [5, 12])
@pytest.mark.parametrize("training", [True, False])
def test_pairs_are_the_concatenations(training, size, dtype, bound, device):
    ours = module(device, dtype, size).train(training)
    theirs = copy.deepcopy(ours)
    x, y = maps(device, dtype, size=size)
    found, expected = ours.pairs(x, y), concatenated_scores(theirs, x, y)
    assert found.shape == (3, 7, 4)
    assert (found - expected).abs().max() < bound
    weights = torch.randn(found.shape, device=device, dtype=dtype)
    inputs = [[x, y, *each.parameters()] for each in (ours, theirs)]
    grads = [
        torch.autograd.grad((weights * value).sum(), of)
        for value, of in zip((found, expected), inputs, strict=True)
    ]
    largest = max(float(g.abs().max()) for g in grads[1])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 20 * bound * largest
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= bound


def test_swapped_halves_of_the_first_weight_swap_the_maps(device):
    ours = module(device, torch.float64).eval()
    swapped = copy.deepcopy(ours)
    weight = swapped.first[0].weight
    with torch.no_grad():
        weight.copy_(weight.roll(4, dims=1))
    x, y = maps(device, torch.float64)
    torch.testing.assert_close(swapped.pairs(y, x), ours.pairs(x, y).mT, rtol=1e-12, atol=1e-12)


def test_one_map_of_each(device):
    x, y = (part[:1, :1] for part in maps(device, torch.float64))
    ours = module(device, torch.float64)
    ours.second[1].eval()  # it has a single value a channel
    theirs = copy.deepcopy(ours)
    torch.testing.assert_close(
        ours.pairs(x, y), concatenated_scores(theirs, x, y), rtol=1e-12, atol=1e-12
    )


def test_norms_of_another_kind_get_the_concatenations(device):
    """Such as shared ones, whose statistics are over several processes."""
    ours = module(device, torch.float64)
    theirs = share_batch_statistics(copy.deepcopy(ours))
    x, y = maps(device, torch.float64)
    seen = []
    theirs.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape))
    torch.testing.assert_close(theirs.pairs(x, y), ours.pairs(x, y), rtol=1e-12, atol=1e-12)
    assert seen == [(3 * 7 * 4, 8, 5, 5)]


@BOUNDS
def test_vectors(dtype, bound, device):
    torch.manual_seed(1)
    mlp = RelationMLP(4, 9).to(device, dtype)
    x, y = (part.flatten(2)[..., :4] for part in maps(device, dtype))
    found, expected = mlp.pairs(x, y), concatenated_scores(mlp, x, y)
    assert (found - expected).abs().max() < bound
    grads = [
        torch.autograd.grad(v.square().sum(), list(mlp.parameters())) for v in (found, expected)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 20 * bound * b.abs().max()


def test_present_pairs_only(device):
    """They are the batch of the norms, the others have score 0."""
    ours = module(device, torch.float64)
    x, y = maps(device, torch.float64)
    present = torch.rand(3, 7, 4, device=device) < 0.5
    theirs = copy.deepcopy(ours)
    found = concatenated_scores(ours, x, y, present)
    t, q, n = present.nonzero(as_tuple=True)
    expected = theirs(torch.cat([y[t, n], x[t, q]], dim=1))
    assert torch.equal(found[present], expected) and (found[~present] == 0).all()


def test_the_encoder_has_the_published_sizes():
    net = RelationEncoder(3, in_channels=2)
    for size, expected in ((28, 5), (84, 19), (22, 4)):
        assert net(torch.zeros(1, 2, size, size)).shape == (1, 3, expected, expected)
        assert RelationEncoder.map_size(size) == expected


def test_the_head_has_the_published_widths():
    assert RelationModule(64, image_size=5).head[1].in_features == 64
    assert RelationModule(64, image_size=19).head[1].in_features == 576


def test_errors():
    ours = RelationModule(4)
    with pytest.raises(ValueError, match=r"x: expected maps \[B, 8, 5, 5\], got \[2, 4, 5, 5\]"):
        ours(torch.zeros(2, 4, 5, 5))
    with pytest.raises(
        ValueError, match=r"y: expected maps \[T, examples, 4, 5, 5\], got \[1, 2, 4"
    ):
        ours.pairs(torch.zeros(1, 2, 4, 5, 5), torch.zeros(1, 2, 4, 6, 6))
    with pytest.raises(ValueError, match="image_size: expected an integer >= 4, got 3"):
        RelationModule(4, image_size=3)
    mlp = RelationMLP(3)
    with pytest.raises(ValueError, match=r"x: expected vectors \[B, 6\], got \[2, 3\]"):
        mlp(torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"x: expected vectors \[T, examples, 3\], got \[1, 2, 4\]"
    ):
        mlp.pairs(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
