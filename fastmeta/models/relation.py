"""Networks that score pairs of embeddings, and the encoder of relation networks."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.checks import check_count
from fastmeta.models._pair_norm import normalize_pairs
from fastmeta.ops.pair_pool import pair_pool
from fastmeta.ops.pair_scores import pair_scores

_UNPADDED = 10  # the least size of maps that two convolutions may shrink
_CHUNK = 2**24  # numbers in the pairs of one call


class RelationEncoder(nn.Sequential):
    """Four blocks of 3x3 convolution, batch norm and ReLU, of which the first two halve the image.

    Sung et al. 2018 (arXiv 1711.06025): the first two convolutions have no padding, so images of
    28 x 28 give maps of 5 x 5, and images of 84 x 84 maps of 19 x 19.

    Args:
        hidden: channels of every block and of the maps.
        in_channels: the images are ``[B, in_channels, H, W]``.

    Raises:
        TypeError, ValueError: an argument is no integer, or below 1.

    Example:
        >>> import torch
        >>> from fastmeta.models import RelationEncoder
        >>> RelationEncoder(hidden=8)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, hidden: int = 64, in_channels: int = 1) -> None:
        check_count("hidden", hidden, least=1)
        inputs = [check_count("in_channels", in_channels, least=1), *[hidden] * 3]
        super().__init__(*(_block(inputs[i], hidden, int(i > 1), i < 2) for i in range(4)))
        self.channels = hidden

    @staticmethod
    def map_size(image_size: int) -> int:
        """Height and width of the maps of images with ``image_size`` rows and columns.

        Example:
            >>> RelationEncoder.map_size(28), RelationEncoder.map_size(84)
            (5, 19)
        """
        return ((image_size - 2) // 2 - 2) // 2


def _block(inputs: int, outputs: int, padding: int, pool: bool = True) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=padding),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class RelationModule(nn.Module):
    """Scores pairs of feature maps: two blocks of 3x3 convolution, then two linear layers.

    The relation module of Sung et al. 2018 (arXiv 1711.06025) without its last sigmoid. Each block
    is convolution, batch norm, ReLU and 2x2 max pooling; the convolutions are padded if maps are
    smaller than 10 x 10.

    ``pairs`` computes what ``forward`` gives for all pairs, by two identities. The convolution of
    a concatenation is the sum of two, so it takes Q + N maps instead of Q N. The batch norm behind
    it has statistics over all pairs in closed form, and folds into both halves.

    Args:
        channels: C of the maps.
        hidden: units between the linear layers.
        image_size: height and width of the maps, at least 4.

    Raises:
        TypeError, ValueError: an argument is no integer, or out of range.

    Example:
        >>> import torch
        >>> from fastmeta.models import RelationModule
        >>> module = RelationModule(channels=4)
        >>> query, support = torch.randn(2, 6, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
        >>> module.pairs(query, support).shape
        torch.Size([2, 6, 3])
        >>> module(torch.randn(7, 8, 5, 5)).shape
        torch.Size([7])
    """

    LEAST = 4  # of image_size: half of the half is 1

    def __init__(self, channels: int = 64, hidden: int = 8, image_size: int = 5) -> None:
        super().__init__()
        self.channels = check_count("channels", channels, least=1)
        self.image_size = check_count("image_size", image_size, least=self.LEAST)
        check_count("hidden", hidden, least=1)
        padding = int(image_size < _UNPADDED)
        self.first = _block(2 * channels, channels, padding)
        self.second = _block(channels, channels, padding)
        size = image_size
        for _ in range(2):
            size = (size - 2 + 2 * padding) // 2
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size**2, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B]`` of pairs: maps of support and query side by side, ``[B, 2 C, H, W]``.

        Raises:
            ValueError: maps of another shape.
        """
        self._check("x", x, 4, 2 * self.channels)
        return self._rest(self.first(x))

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores ``[T, Q, N]`` of query maps x ``[T, Q, C, H, W]`` with maps y ``[T, N, C, H, W]``.

        Raises:
            ValueError: maps of another shape.
        """
        for name, maps in (("x", x), ("y", y)):
            self._check(name, maps, 5, self.channels)
        convolution, norm = cast("nn.Conv2d", self.first[0]), self.first[1]
        if type(norm) is not nn.BatchNorm2d:  # statistics of several processes, for instance
            return concatenated_scores(self, x, y)
        of_support, of_query = convolution.weight.split(self.channels, dim=1)
        padding = cast("tuple[int, int]", convolution.padding)
        query, support = (
            F.conv2d(maps.flatten(0, 1), weight, bias, padding=padding)
            for maps, weight, bias in ((x, of_query, None), (y, of_support, convolution.bias))
        )
        halves = query.unflatten(0, x.shape[:2]), support.unflatten(0, y.shape[:2])
        pooled = pair_pool(*normalize_pairs(*halves, norm), 2)
        return self._rest_of_pairs(pooled.flatten(0, 2)).view(pooled.shape[:3])

    def extra_repr(self) -> str:
        return f"channels={self.channels}, image_size={self.image_size}"

    def _rest(self, x: Tensor) -> Tensor:
        return self.head(self.second(x)).squeeze(1)

    def _rest_of_pairs(self, x: Tensor) -> Tensor:
        """Same as ``_rest``, by one matrix product if the pooled maps are 2 x 2."""
        if x.shape[2:] != (2, 2):
            return self._rest(x)
        convolution = cast("nn.Conv2d", self.second[0])
        return self.head(self.second[1:](_on_2x2(x, convolution))).squeeze(1)

    def _check(self, name: str, x: Tensor, dims: int, channels: int) -> None:
        shape = channels, self.image_size, self.image_size
        if x.dim() != dims or x.shape[-3:] != shape:
            leading = {4: "B", 5: "T, examples"}[dims]
            raise ValueError(
                f"{name}: expected maps [{leading}, {', '.join(map(str, shape))}], "
                f"got {list(x.shape)}"
            )


def _on_2x2(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A padded 3x3 convolution of maps ``[B, C, 2, 2]`` as one matrix product.

    Each of the four outputs sees each of the four inputs by an entry of its own: 16 products
    instead of the 36 with a padded border. The result is in channels_last, in which PyTorch's norms
    and pooling of small maps are several times as fast.
    """
    place = torch.arange(4, device=x.device)
    row, column = (part.unsqueeze(0) - part.unsqueeze(1) + 1 for part in (place // 2, place % 2))
    weight = convolution.weight.flatten(2)[:, :, 3 * row + column]  # [O, C, output, input]
    weight = weight.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)
    bias = None if convolution.bias is None else convolution.bias.repeat(4)
    y = F.linear(x.flatten(1), weight, bias)
    return y.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)


class RelationMLP(nn.Module):
    """Scores pairs of vectors by a layer of ReLU units: ``w . relu(W cat(y, x) + b) + c``.

    ``pairs`` computes what ``forward`` gives for all pairs: the first layer is split into its
    halves, which take Q + N rows, and :func:`fastmeta.pair_scores` does the rest.

    Args:
        dim: D, the width of the embeddings.
        hidden: units of the layer.

    Raises:
        TypeError, ValueError: an argument is no integer, or below 1.

    Example:
        >>> import torch
        >>> from fastmeta.models import RelationMLP
        >>> module = RelationMLP(dim=4, hidden=16)
        >>> module.pairs(torch.randn(2, 6, 4), torch.randn(2, 3, 4)).shape
        torch.Size([2, 6, 3])
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.dim = check_count("dim", dim, least=1)
        self.hidden = nn.Linear(2 * dim, check_count("hidden", hidden, least=1))
        self.output = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B]`` of pairs: support and query side by side, ``[B, 2 D]``.

        Raises:
            ValueError: vectors of another width.
        """
        if x.dim() != 2 or x.shape[1] != 2 * self.dim:
            raise ValueError(f"x: expected vectors [B, {2 * self.dim}], got {list(x.shape)}")
        return self.output(self.hidden(x).relu()).squeeze(1)

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores ``[T, Q, N]`` of query vectors x ``[T, Q, D]`` with vectors y ``[T, N, D]``.

        Raises:
            ValueError: vectors of another width.
        """
        for name, rows in (("x", x), ("y", y)):
            if rows.dim() != 3 or rows.shape[2] != self.dim:
                raise ValueError(
                    f"{name}: expected vectors [T, examples, {self.dim}], got {list(rows.shape)}"
                )
        of_support, of_query = self.hidden.weight.split(self.dim, dim=1)
        weight, bias = self.output.weight[0], self.output.bias[0]
        halves = F.linear(x, of_query), F.linear(y, of_support, self.hidden.bias)
        query, support = (half.to(weight.dtype) for half in halves)  # of half types in autocast
        return pair_scores(query, support, weight, bias)


def needs_batch(module: nn.Module) -> bool:
    """Whether a batch norm of ``module`` takes the statistics of its batch."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in module.modules()
    )


def concatenated_scores(
    module: nn.Module, x: Tensor, y: Tensor, present: Tensor | None = None
) -> Tensor:
    """Scores ``[T, Q, N]`` of x ``[T, Q, C, ...]`` with y ``[T, N, C, ...]``, pair by pair.

    ``module`` gets the concatenations ``cat(y, x)`` of the pairs, ``[B, 2 C, ...]``, and gives
    ``[B]`` or ``[B, 1]``. Without gradients it gets them in chunks, unless it takes statistics of
    its batch.

    Args:
        module: any module of pairs.
        x: ``[T, Q, C, ...]``.
        y: ``[T, N, C, ...]``.
        present: bool ``[T, Q, N]``, the pairs that the module sees, the others have score 0; None:
            all of them.

    Raises:
        ValueError: the module does not return one score a pair.
    """
    shape = (*x.shape[:2], y.shape[1])
    if present is None:
        tail = x.shape[2:]
        wide = y.unsqueeze(1).expand(*shape, *tail), x.unsqueeze(2).expand(*shape, *tail)
        return _scores(module, *(half.flatten(0, 2) for half in wide)).view(shape)
    task, query, other = present.nonzero(as_tuple=True)
    scores = _scores(module, y[task, other], x[task, query])
    return scores.new_zeros(shape).index_put((task, query, other), scores)


def _scores(module: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Scores ``[B]`` of the pairs of rows ``[B, C, ...]``."""
    whole = torch.is_grad_enabled() or needs_batch(module)
    rows = len(first) if whole else _CHUNK // max(1, 2 * first.shape[1:].numel())
    chunks = zip(first.split(max(1, rows)), second.split(max(1, rows)), strict=True)
    scores = torch.cat([module(torch.cat(halves, dim=1)) for halves in chunks])
    if scores.shape not in ((len(first),), (len(first), 1)):
        raise ValueError(
            f"relation: expected one score a pair, [{len(first)}], got {list(scores.shape)}"
        )
    return scores.reshape(len(first))
