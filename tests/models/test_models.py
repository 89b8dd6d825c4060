"""The networks of the literature: sizes, shapes, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import fastmeta as fm


def test_the_residual_network_of_metaoptnet_has_its_12_4_million_parameters():
    """A block of widths i, o has 9 i o + 18 o o + i o weights and 8 o of batch norms."""
    net = fm.models.ResNet12((64, 160, 320, 640), ways=None)
    assert sum(p.numel() for p in net.parameters()) == 12_424_320


@pytest.mark.parametrize(("ways", "outputs"), [(7, 7), (None, 5)])
@pytest.mark.parametrize("shape", [(16, 16), (35, 50)])
def test_outputs_and_embeddings_of_a_residual_network(ways, outputs, shape):
    net = fm.models.ResNet12((2, 3, 4, 5), ways, in_channels=1)
    assert net(torch.randn(3, 1, *shape)).shape == (3, outputs)
    assert net.embedding_size == 5


@pytest.mark.parametrize("widths", [(1, 2, 3), (1, 2, 0, 3)])
def test_widths_that_are_no_widths(widths):
    with pytest.raises(ValueError, match=r"widths: expected four numbers of at least 1, got \("):
        fm.models.ResNet12(widths)


@pytest.mark.parametrize("pool", ["max", "stride"])
def test_conv4_says_the_size_of_its_embeddings(pool):
    net = fm.models.Conv4(3, None, 2, 40, pool)
    assert net(torch.randn(2, 2, 40, 40)).shape == (2, net.embedding_size)
