"""Every layer and function of PyTorch that a network can use, each inside a small network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.networks import Tasks

TASKS, EXAMPLES = 3, 4


class Around(nn.Module):
    """A layer between an elementwise affine map and a linear head, so that gradients pass it.

    Inputs that are integers go to the layer as they are.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.layer = layer
        if x.is_floating_point():
            self.scale = nn.Parameter(1 + 0.1 * torch.randn(x.shape[1:]))
            self.shift = nn.Parameter(0.1 * torch.randn(x.shape[1:]))
        features = self.features(x).shape[1]
        self.head = nn.Linear(features, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale + self.shift if x.is_floating_point() else x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Function(nn.Module):
    """A function as a layer, with a learned tensor of some shape as its second argument."""

    def __init__(self, function: Callable[..., Tensor], *weight: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(0.3 * torch.randn(weight)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


class First(nn.Module):
    """The first of a layer's outputs, such as a recurrent layer's."""

    def __init__(self, layer: nn.Module, *copies: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attend(nn.Module):
    """Self-attention of a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class Twice(nn.Module):
    """A layer of two inputs: x and x squared."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.square())


@dataclass(frozen=True)
class LayerCase:
    """A layer, the shape of one example, and whether examples are class numbers below 7."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    is_integer: bool = False

    def network_and_tasks(self) -> tuple[nn.Module, Tasks]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        size = (TASKS, EXAMPLES, *self.shape)

        def examples() -> tuple[Tensor, Tensor]:
            y = torch.randn(TASKS, EXAMPLES, 2, generator=generator, dtype=torch.float64)
            if self.is_integer:
                return torch.randint(7, size, generator=generator), y
            return torch.randn(size, generator=generator, dtype=torch.float64), y

        tasks = Tasks(*examples(), *examples())
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return Around(self.make(), tasks.support_x[0]), tasks
        finally:
            torch.set_default_dtype(default)


_ELEMENTWISE: list[Callable[[], nn.Module]] = [
    *(nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6),
    *(nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh),
    *(nn.Tanhshrink, nn.Identity, nn.Flatten),
]

_OF_FEATURES: dict[str, Callable[..., Tensor]] = {
    "exp_log": lambda x: (x.exp() + 1).log(),
    "sqrt": lambda x: (x.square() + 1).sqrt(),
    "rsqrt_pow": lambda x: (x.square() + 1).rsqrt() + (x.abs() + 1) ** 1.5,
    "sin_cos": lambda x: x.sin() * x.cos(),
    "erf_atan": lambda x: x.erf() + x.atan() + x.asinh(),
    "clamp_where": lambda x: torch.where(x > 0, x, 0.1 * x.square()).clamp(-1, 1),
    "max_min": lambda x: torch.maximum(x, x.flip(1)) + torch.minimum(x, x.roll(1, 1)).square(),
    "amax": lambda x: x * x.amax(1, keepdim=True) + x.max(1, keepdim=True).values,
    "sort_topk": lambda x: x.sort(1).values[:, :3] * x.topk(3, 1).values,
    "cumsum_cumprod": lambda x: x.cumsum(1) + x.cumprod(1),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "norms": lambda x: x / x.norm(dim=1, keepdim=True) + x.std(1, keepdim=True),
    "var_mean": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1),
    "cat_stack": lambda x: torch.cat([x, torch.stack([x, x.square()]).sum(0)], 1),
    "split_chunk": lambda x: x.split(2, 1)[1] * x.chunk(3, 1)[0],
    "index": lambda x: x[:, [0, 2, 2]] * x.index_select(1, torch.tensor([1, 1, 3])),
    "gather_scatter": lambda x: x.scatter_add(1, x.argsort(1), x.square()),
    "pad": lambda x: F.pad(x, (1, 2)).square(),
    "unfold_view": lambda x: x.unfold(1, 2, 2).transpose(1, 2).reshape(len(x), -1).square(),
    "outer": lambda x: torch.einsum("bi,bj->bij", x, x),
    "bmm": lambda x: x.unsqueeze(1) @ x.unsqueeze(2) + torch.bmm(x[:, :, None], x[:, None]),
    "softmax": lambda x: F.softmax(x, 1) + F.log_softmax(x, 1) + F.softmin(x, 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine": lambda x: F.cosine_similarity(x[:, :3], x[:, 3:]).unsqueeze(1),
    "pairwise_distance": lambda x: F.pairwise_distance(x[:, :3], x[:, 3:]).unsqueeze(1),
    "cdist": lambda x: torch.cdist(x, x.flip(0)),
    "rrelu": lambda x: F.rrelu(x, training=False),
    "glu": lambda x: F.glu(x, 1),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2).square(),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.3).square(),
    "lerp_addcmul": lambda x: torch.lerp(x, x.square(), 0.3) + torch.addcmul(x, x, x),
    "solve": lambda x: torch.linalg.solve(
        x[:, :4].reshape(-1, 2, 2) + 3 * torch.eye(2, dtype=x.dtype), x[:, 4:]
    ),
    "svd_free_inverse": lambda x: torch.linalg.inv(
        x[:, :4].reshape(-1, 2, 2) + 3 * torch.eye(2, dtype=x.dtype)
    ),
    "det_trace": lambda x: x[:, :4].reshape(-1, 2, 2).det().unsqueeze(1),
    "cholesky": lambda x: torch.linalg.cholesky(
        x[:, :2, None] * x[:, None, :2] + torch.eye(2, dtype=x.dtype)
    ),
}
_OF_IMAGES: dict[str, Callable[..., Tensor]] = {
    "interpolate_nearest": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate_bilinear": lambda x: F.interpolate(x, size=(3, 5), mode="bilinear"),
    "interpolate_bicubic": lambda x: F.interpolate(x, size=(3, 5), mode="bicubic"),
    "interpolate_area": lambda x: F.interpolate(x, size=(2, 3), mode="area"),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "affine_grid": lambda x: F.grid_sample(
        x,
        F.affine_grid(
            torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3) * (1 + x.mean() / 9),
            list(x.shape),
            align_corners=False,
        ),
        align_corners=False,
    ),
    "unfold_fold": lambda x: F.fold(F.unfold(x, 2, stride=2).square(), (4, 4), 2, stride=2),
    "lp_pool": lambda x: F.lp_pool2d(x, 2.0, 2),
    "local_response": lambda x: F.local_response_norm(x, 2),
    "fft": lambda x: torch.fft.rfft2(x).abs(),
}
_WITH_WEIGHT: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (6,), (3, 6)),
    "matmul": (torch.matmul, (6,), (6, 3)),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (6,), (2, 6, 6)),
    "prelu": (F.prelu, (6,), (6,)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (6,), w), (6,), (6,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), (6,), (6,)),
    "conv1d": (F.conv1d, (2, 6), (3, 2, 3)),
    "conv2d": (F.conv2d, (2, 4, 4), (3, 2, 3, 3)),
    "conv2d_grouped": (lambda x, w: F.conv2d(x, w, groups=2), (4, 4, 4), (4, 2, 3, 3)),
    "conv3d": (F.conv3d, (2, 3, 3, 3), (3, 2, 2, 2, 2)),
    "conv_transpose1d": (F.conv_transpose1d, (2, 6), (2, 3, 3)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 4, 4), (2, 3, 3, 3)),
    "scaled_dot_product_attention": (
        lambda x, w: F.scaled_dot_product_attention(x @ w, x, x), (5, 4), (4, 4),
    ),
    "causal_attention": (
        lambda x, w: F.scaled_dot_product_attention(x @ w, x, x, is_causal=True), (5, 4), (4, 4)
    ),
    "functional_batch_norm": (
        lambda x, w: F.batch_norm(x, None, None, w, training=True), (6,), (6,)
    ),
    "instance_norm": (lambda x, w: F.instance_norm(x, weight=w), (6, 5), (6,)),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w), (6, 5), (6,)),
}  # fmt: skip

line, image, volume, sequence = (4, 8), (4, 6, 6), (2, 4, 4, 4), (5, 4)
_MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 3), (6,)),
    "Bilinear": (lambda: Twice(nn.Bilinear(6, 6, 2)), (6,)),
    "Softmax": (lambda: nn.Softmax(1), (6,)),
    "Softmin": (lambda: nn.Softmin(1), (6,)),
    "LogSoftmax": (lambda: nn.LogSoftmax(1), (6,)),
    "Softmax2d": (lambda: nn.Softmax2d(), image),
    "Threshold": (lambda: nn.Threshold(0.1, 0.3), (6,)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6,)),
    "CosineSimilarity": (
        lambda: Function(lambda x: nn.CosineSimilarity(1)(x[:, :2], x[:, 2:])), line,
    ),
    "PairwiseDistance": (
        lambda: Function(lambda x: nn.PairwiseDistance()(x[:, :2], x[:, 2:])), line,
    ),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=1), line),
    "Conv1d_dilated": (lambda: nn.Conv1d(4, 4, 3, dilation=2, groups=2), line),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1), image),
    "Conv2d_reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), image),
    "Conv2d_circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), image),
    "Conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), image),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3), volume),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), line),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), image,
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), volume),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), line),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, stride=2, padding=1), image),
    "MaxPool2d_ceil": (lambda: nn.MaxPool2d(4, ceil_mode=True), image),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), volume),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), line),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, padding=1, count_include_pad=False), image),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), volume),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), line),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), image),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(3), line),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((2, 3)), image),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), volume),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(3), line),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((4, 3)), image),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), volume),
    "FractionalMaxPool2d": (
        lambda: nn.FractionalMaxPool2d(
            2, 3, _random_samples=torch.full((EXAMPLES, 4, 2), 0.4)
        ), image,
    ),
    "MaxUnpool2d": (
        lambda: Function(
            lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)
        ), image,
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), line),
    "BatchNorm1d_features": (lambda: nn.BatchNorm1d(6), (6,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), image),
    "BatchNorm2d_plain": (lambda: nn.BatchNorm2d(4, affine=False), image),
    "BatchNorm2d_untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), image),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), volume),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), line),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), image,
    ),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2), volume),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), image),
    "LayerNorm": (lambda: nn.LayerNorm([4, 6, 6]), image),
    "RMSNorm": (lambda: nn.RMSNorm(8), line),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), image),
    "Dropout": (lambda: nn.Dropout(0.0), line),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), image),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), image),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), image),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), image),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), image),
    "ReflectionPad1d": (lambda: nn.ReflectionPad1d(2), line),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), image),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), volume),
    "CircularPad2d": (lambda: nn.CircularPad2d(1), image),
    "ConstantPad1d": (lambda: nn.ConstantPad1d(1, 0.5), line),
    "Unfold": (lambda: nn.Unfold(2), image),
    "Fold": (lambda: nn.Fold((3, 5), (2, 2)), (4, 8)),
    "RNN": (lambda: First(nn.RNN(4, 3, batch_first=True)), sequence),
    "RNN_relu": (
        lambda: First(nn.RNN(4, 3, 2, nonlinearity="relu", batch_first=True)), sequence,
    ),
    "LSTM": (lambda: First(nn.LSTM(4, 3, batch_first=True)), sequence),
    "LSTM_two_ways": (
        lambda: First(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), sequence,
    ),
    "LSTM_projected": (
        lambda: First(nn.LSTM(4, 3, batch_first=True, proj_size=2)), sequence,
    ),
    "GRU": (lambda: First(nn.GRU(4, 3, batch_first=True)), sequence),
    "RNNCell": (lambda: nn.RNNCell(6, 3), (6,)),
    "LSTMCell": (lambda: First(nn.LSTMCell(6, 3)), (6,)),
    "GRUCell": (lambda: nn.GRUCell(6, 3), (6,)),
    "MultiheadAttention": (
        lambda: Attend(nn.MultiheadAttention(4, 2, batch_first=True)), sequence,
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), sequence,
    ),
    "TransformerDecoderLayer": (
        lambda: Twice(nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True)),
        sequence,
    ),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), (6,),
    ),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 3)), (6,)),
}  # fmt: skip

_OF_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(7, 3),
    "Embedding_padding": lambda: nn.Embedding(7, 3, padding_idx=2),
    "Embedding_scaled": lambda: nn.Embedding(7, 3, scale_grad_by_freq=True),
    "EmbeddingBag": lambda: nn.EmbeddingBag(7, 3),
    "EmbeddingBag_sum_padding": lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=2),
    "EmbeddingBag_max": lambda: nn.EmbeddingBag(7, 3, mode="max"),
}

# PyTorch has no second derivative of them, and says so.
ONCE_DIFFERENTIABLE = {
    *("Hardsigmoid", "cdist", "EmbeddingBag", "EmbeddingBag_sum_padding", "EmbeddingBag_max"),
}

LAYERS = {
    **{layer.__name__: LayerCase(layer, (6,)) for layer in _ELEMENTWISE},
    **{name: LayerCase(make, shape) for name, (make, shape) in _MODULES.items()},
    **{name: LayerCase(make, (5,), is_integer=True) for name, make in _OF_TOKENS.items()},
    **{n: LayerCase(lambda f=f: Function(f), (6,)) for n, f in _OF_FEATURES.items()},
    **{n: LayerCase(lambda f=f: Function(f), (4, 4, 4)) for n, f in _OF_IMAGES.items()},
    **{
        name: LayerCase(lambda f=f, w=w: Function(f, *w), shape)
        for name, (f, shape, w) in _WITH_WEIGHT.items()
    },
}
