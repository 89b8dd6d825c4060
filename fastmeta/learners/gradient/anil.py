"""ANIL: an inner loop for the head only, on the features of a body that the tasks share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT, is_readable
from fastmeta.core.checks import check_choice, check_dense, check_integer, check_number
from fastmeta.core.memory import kept_pages
from fastmeta.core.module_inputs import check_inputs
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.plain_module import plain_module
from fastmeta.core.step_sizes import check_step_size
from fastmeta.engines.autograd import entry_point, is_learned
from fastmeta.engines.base import NORM_STATISTICS, Examples, MetaGradient, TaskBatch
from fastmeta.engines.checks import check_examples
from fastmeta.engines.explain import describe_tasks
from fastmeta.engines.functional.vmap_errors import why_not_vmapped
from fastmeta.engines.program.encoder import EncoderEngine, check_lower
from fastmeta.engines.program.lowering import lower_loss
from fastmeta.learners._absent import on_present_of_tasks, present_examples
from fastmeta.learners._compile import CompilableLearner, as_single_op
from fastmeta.learners._example_weights import check_weight, seen
from fastmeta.learners.gradient._shared_body import body_outputs
from fastmeta.learners.gradient._weighted_head import weighted_head_loss
from fastmeta.ops import backend_of
from fastmeta.ops._checks import check_floating, check_labels, check_mask, check_together
from fastmeta.ops._linear_head_arguments import HeadOptions, checked_head, step_sizes
from fastmeta.ops.linear_head import FORMS, linear_head, uses_kernel_form
from fastmeta.ops.linear_head_loss import head_loss
from fastmeta.ops.reference import check_label_range
from fastmeta.ops.task_linear import task_linear

_IGNORED = -100  # the ignore_index of F.cross_entropy without options

_LOSSES = {
    lower_loss(function)[0]: name
    for function, name in (
        (F.cross_entropy, "cross_entropy"),
        (F.mse_loss, "mse"),
        (F.binary_cross_entropy_with_logits, "logistic"),
    )
}


class ANIL(CompilableLearner):
    """ANIL, "almost no inner loop" (Raghu et al. 2020, arXiv 1909.09157): adapts the head only.

        W_{k+1} = W_k - lr grad_W L_s(W_k f(x_s))        f the body, W the head, K times

    The meta-gradient of the mean over tasks of L_q(W_K f(x_q)) is exact: it reaches the head's
    initial parameters through the inner steps, and the body through queries and support. All steps
    of all tasks are one call of ``fastmeta.linear_head``; the body sees each example once.

    The body's batch norms use the statistics of each task's batch, as in ``MAML``.

    Tasks may have unequal numbers of examples: one whose label is -1, or the ``ignore_index`` -100
    of the cross entropy, is absent. The body does not see it, losses are means over the others, and
    its gradient is 0. A task without present queries has loss 0. Where labels cannot be read, under
    ``torch.vmap`` and in a CUDA graph, the body sees absent examples too.

    Args:
        body: any module of one input and one output, the features ``[B, D]``. It may be frozen
            (``requires_grad=False``), or ``nn.Identity()`` if the inputs are features.
        head: ``nn.Linear(D, N)`` with or without a bias, its parameters trainable.
        lr: inner step size: a number, or a tensor or ``nn.Parameter`` ``[]``, or ``[K]``, one
            number a step.
        steps: inner gradient steps K; 0 adapts nothing.
        loss: ``F.cross_entropy``, ``F.mse_loss`` or, for a head of one output,
            ``F.binary_cross_entropy_with_logits``, or the module of one of these, all without
            options.
        first_order: leave the second derivatives out (FOMAML): the body then learns from the
            queries only. Step sizes still get a gradient, the support inputs none.
        learn_lr: make ``lr`` a parameter that is learned with the others.
        weight_decay: factor of the head's parameters that is added to their inner gradients.
        form: form of the inner loop, ``"auto"``, ``"primal"`` or ``"dual"``, see
            ``fastmeta.linear_head``.
        task_chunk: tasks whose examples pass the body together, None for all; 1 runs them one by
            one, for bodies that vmap cannot take.
        norm_statistics: ``"batch"`` or ``"running"``, as for ``MAML``.
        lower: ``"auto"``: without ``task_chunk``, the body runs on fastmeta's own CPU kernels where
            these compute what it would, see ``fastmeta.lower``. ``False``: always in PyTorch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, by name.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> body = fm.models.Conv4(hidden=8, ways=None)
        >>> anil = fm.ANIL(body, torch.nn.Linear(body.embedding_size, 5), lr=0.1, steps=5)
        >>> x, y = torch.rand(4, 5, 1, 28, 28), torch.arange(5).repeat(4, 1)
        >>> loss, logits = anil.meta_loss(x, y, x, y)
        >>> loss.backward()
        >>> logits.shape, anil.head.weight.grad.shape
        (torch.Size([4, 5, 5]), torch.Size([5, 8]))
    """

    lr: float | Tensor

    def __init__(
        self,
        body: nn.Module,
        head: nn.Linear,
        lr: float | Tensor = 0.1,
        steps: int = 5,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        first_order: bool = False,
        learn_lr: bool = False,
        weight_decay: float = 0.0,
        form: str = "auto",
        task_chunk: int | None = None,
        norm_statistics: str = "batch",
        lower: str | bool = "auto",
    ) -> None:
        super().__init__()
        body = plain_module("body", body)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head: expected an nn.Linear, got {type(head).__name__}")
        check_integer("steps", steps, 0)
        if not isinstance(first_order, bool):
            raise TypeError(f"first_order: expected a bool, got {first_order!r}")
        check_choice("form", form, FORMS)
        if task_chunk is not None:
            check_integer("task_chunk", task_chunk, 1)
        check_choice("norm_statistics", norm_statistics, NORM_STATISTICS)
        self.module = nn.Sequential(OrderedDict(body=body, head=head))
        self.steps = steps
        self.loss = loss
        self.first_order = first_order
        self.weight_decay = check_number("weight_decay", weight_decay)
        self.form = form
        self.task_chunk = task_chunk
        self.norm_statistics = norm_statistics
        self.lower = check_lower(lower)
        self._engine = EncoderEngine(norm_statistics)
        self._inner_loss = _named(loss, head.out_features)
        self._set_step_size(lr, learn_lr)
        _layout(head)

    @property
    def body(self) -> nn.Module:
        """The body; ``module`` is the body followed by the head."""
        return cast("nn.Module", self.module.body)

    @property
    def head(self) -> nn.Linear:
        """The head, from which the inner loop of every task starts."""
        return cast("nn.Linear", self.module.head)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of body and head, with their current parameters."""
        return self.module(x)

    @as_single_op
    def meta_loss(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mean over tasks of the query loss after adaptation to the support.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: int64 labels ``[T, S]`` for the cross entropy; targets ``[T, S, N]`` of the
                head's dtype for the squared error; 0 or 1 in ``[T, S, 1]``, of the head's dtype,
                for the binary cross entropy. Label -1: an absent example.
            query_x, query_y: the same with Q examples.
            support_weight, query_weight: as for ``MAML``, divided by their sum in a task. The body
                sees an example of weight 0 only if the weights require a gradient.

        Returns:
            ``loss`` and the detached outputs on the queries ``[T, Q, N]``, which for absent queries
            have no meaning. The loss has an ordinary autograd graph, which can be differentiated as
            many times as the body can; with weights, once.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples.
        """
        batch = TaskBatch(support_x, support_y, query_x, query_y)
        check_examples(_layout(self.head), batch.support, batch.query)
        if support_weight is not None or query_weight is not None:
            return self._weighted_loss(batch, support_weight, query_weight)
        targets, query_targets = (
            self._targets(e.y_name, e.y) for e in (batch.support, batch.query)
        )
        features = self._support_features(support_x, targets)
        weight, bias = self.head.weight, self.head.bias
        head = checked_head(features, targets, weight, bias, self._inner_loss)
        lr = step_sizes(self._step_sizes(self.steps), self.steps, features)
        kernel_form = uses_kernel_form(self.form, head, self.steps)
        options = HeadOptions(self._inner_loss, self.weight_decay, self.first_order, kernel_form)
        present = _present(query_targets)
        with kept_pages():
            query = self._features(query_x, "query_x", present)
            return head_loss(head, lr, query, query_targets, options)

    def adapt_tasks(
        self, support_x: Tensor, support_y: Tensor, steps: int | None = None
    ) -> AdaptedHeads:
        """The head adapted to every task.

        Args:
            support_x, support_y: as for ``meta_loss``.
            steps: inner steps; None for the learner's own. If ``lr`` has a number a step, the first
                ``steps`` numbers are used, and more steps than numbers raise.

        Returns:
            ``AdaptedHeads``: call it on queries ``[T, Q, ...]``; its ``params`` are ``[T, P]``.

        Raises:
            TypeError, ValueError: as for ``meta_loss``.
        """
        steps = self.steps if steps is None else steps
        check_integer("steps", steps, 0)
        layout = _layout(self.head)
        check_examples(layout, Examples(support_x, support_y))
        weight, bias = self._adapt(support_x, support_y, steps)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return AdaptedHeads(layout.flatten(tensors), layout, self)

    def meta_gradient(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> MetaGradient:
        """The meta-loss and its gradient as values: ``meta_loss`` and ``backward`` in one call.

        Args:
            support_x, support_y, query_x, query_y: as for ``meta_loss``; they get no gradient.

        Returns:
            ``grads`` ``[P]`` is the gradient to all trainable parameters of ``module``, body and
            head. It is zero for parameters on which the loss does not depend.

        Raises:
            TypeError, ValueError: as for ``meta_loss``.

        Example:
            >>> import torch
            >>> anil = ANIL(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
            >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
            >>> result = anil.meta_gradient(x, y, x, y)
            >>> result.grads.shape
            torch.Size([26])
            >>> result.assign_to(anil)  # as loss.backward() does on gradients of None
            >>> anil.body.weight.grad.shape
            torch.Size([4, 3])
        """
        layout, named = ParameterLayout.of(self.module), dict(self.module.named_parameters())
        learned = [self.lr] if is_learned(self.lr) else []
        sources = [*(named[name] for name in layout.names), *learned]
        batch = TaskBatch(support_x, support_y, query_x, query_y).detached()
        with torch.enable_grad():
            loss, outputs = self.meta_loss(*batch.data)
        grads = torch.autograd.grad(loss, sources, materialize_grads=True)
        flat = layout.flatten(dict(zip(layout.names, grads, strict=False)))
        return MetaGradient(loss.detach(), outputs, flat, grads[-1] if learned else None, {})

    def explain(self) -> str:
        """Describe how this learner computes, in a few sentences."""
        weight = self.head.weight
        backend = backend_of("linear_head", weight.device, weight.dtype)
        together = describe_tasks(self.task_chunk, why_not_vmapped(self.body))
        trained = sum(p.numel() for p in self.body.parameters() if p.requires_grad)
        lowered = f" {self._engine.explain(self.body)}" if self._is_lowered else ""
        order = "first order" if self.first_order else "second order, exact"
        return (
            f"ANIL. The body ({type(self.body).__name__}, {trained} trained parameters): "
            f"{together}, "
            f"norms by {self.norm_statistics} statistics. The head "
            f"({self.head.in_features} features, {self.head.out_features} outputs): "
            f"inner steps: {self.steps} of {self._inner_loss}, {self.form} form, {order}, all in "
            f"one linear_head by the {backend} backend on {weight.device.type} in "
            f"{str(weight.dtype).removeprefix('torch.')}.{lowered}"
        )

    def _weighted_loss(
        self, batch: TaskBatch, support_weight: Tensor | None, query_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The meta-loss of weighed examples, by an engine on the head only."""
        sets = []
        for examples, weight in ((batch.support, support_weight), (batch.query, query_weight)):
            if weight is not None:
                check_weight(examples.weight_name, weight, examples.y)
            targets = self._targets(examples.y_name, examples.y)
            features = self._features(examples.x, examples.x_name, seen(targets, weight))
            y = targets if self._inner_loss == "cross_entropy" else examples.y
            sets.append(Examples(features, y, examples.role, weight))
        support, query = sets
        options = self.steps, self.first_order, self.weight_decay
        lr = self._step_sizes(self.steps)
        return weighted_head_loss(self.head, self.loss, support, query, lr, *options)

    def _adapt(
        self, support_x: Tensor, support_y: Tensor, steps: int
    ) -> tuple[Tensor, Tensor | None]:
        """Each task's weight ``[T, N, D]`` and bias ``[T, N]``."""
        targets = self._targets("support_y", support_y)
        features = self._support_features(support_x, targets)
        return linear_head(
            features,
            targets,
            self.head.weight,
            self.head.bias,
            lr=self._step_sizes(steps),
            steps=steps,
            loss=self._inner_loss,
            weight_decay=self.weight_decay,
            form=self.form,
            first_order=self.first_order,
        )

    def _support_features(self, x: Tensor, targets: Tensor) -> Tensor:
        # To first order the support features get no gradient, so no graph of them is kept.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.first_order):
            return self._features(x, "support_x", _present(targets))

    def _outputs(
        self, query_x: Tensor, weight: Tensor, bias: Tensor | None, present: Tensor | None
    ) -> Tensor:
        return task_linear(self._features(query_x, "query_x", present), weight, bias)

    @entry_point
    def _features(self, x: Tensor, name: str, present: Tensor | None) -> Tensor:
        """``[T, B, ...]`` -> ``[T, B, D]``, in the head's dtype, also under autocast.

        ``name`` is the argument's in errors. ``present``: bool ``[T, B]``, the examples that the
        body sees; the others have features 0.
        """
        engine = self._engine if self._is_lowered else None

        def features_of(x: Tensor) -> Tensor:
            features = body_outputs(
                self.body, x, name, engine, self.norm_statistics, self.task_chunk
            )
            expected = (*x.shape[:2], self.head.in_features)
            if features.shape != expected:
                raise ValueError(
                    f"body: expected features {list(expected[1:])} of a task, as head takes "
                    f"{expected[-1]}, got {list(features.shape[1:])}"
                )
            return features.to(self.head.weight.dtype)

        if present is None:
            return features_of(x)
        features = on_present_of_tasks(features_of, x, present)
        if features is None:
            return self.head.weight.new_zeros(*present.shape, self.head.in_features)
        return features

    @property
    def _is_lowered(self) -> bool:
        # The tasks of a program's call are all in memory.
        return self.lower is not False and self.task_chunk is None

    def _targets(self, name: str, y: Tensor) -> Tensor:
        """Check labels or targets; returns them in the form of ``linear_head``."""
        weight, ways = self.head.weight, self.head.out_features
        if self._inner_loss == "cross_entropy":
            check_labels(name, y, y.shape[:2], weight.device)
            if is_readable(y) and int(y.min()) < ABSENT:
                y = y.masked_fill(y == _IGNORED, ABSENT)
            check_label_range(y, ways, name)
            return y
        check_floating(name, y)
        check_together(name, y, "head", weight)
        if y.shape[2:] != (ways,):
            raise ValueError(f"{name}: expected shape [T, examples, {ways}], got {list(y.shape)}")
        return _binary_labels(name, y) if self._inner_loss == "logistic" else y

    def _step_sizes(self, steps: int) -> float | Tensor:
        lr = self.lr
        if not isinstance(lr, Tensor) or lr.ndim == 0:
            return lr
        if steps > len(lr):
            raise ValueError(
                f"steps: expected at most {len(lr)}, as lr has a number for each of {len(lr)} "
                f"steps, got {steps}"
            )
        return lr[:steps]

    def _set_step_size(self, lr: float | Tensor, learn: bool) -> None:
        check_step_size(lr, self.steps)
        weight = self.head.weight
        if learn and not isinstance(lr, nn.Parameter):
            value = torch.as_tensor(lr, dtype=weight.dtype, device=weight.device)
            lr = nn.Parameter(value.detach().clone())
        if isinstance(lr, Tensor) and not isinstance(lr, nn.Parameter):
            self.register_buffer("lr", lr.to(weight.device, weight.dtype))
        else:
            self.lr = lr


@dataclass(frozen=True)
class AdaptedHeads:
    """A head adapted to T tasks, after the body that the tasks share.

    Attributes:
        params: the head's parameters of every task ``[T, P]``, in the order of ``layout``;
            differentiable, also in the body's parameters.
        layout: names and shapes of the head's parameters.
        learner: the :class:`ANIL` whose body computes the queries' features.

    Example:
        >>> import torch
        >>> anil = ANIL(torch.nn.Identity(), torch.nn.Linear(3, 2))
        >>> adapted = anil.adapt_tasks(torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5)))
        >>> adapted(torch.randn(4, 7, 3)).shape, adapted.params.shape, len(adapted)
        (torch.Size([4, 7, 2]), torch.Size([4, 8]), 4)
        >>> adapted.task(0)["bias"].shape
        torch.Size([2])
    """

    params: Tensor
    layout: ParameterLayout
    learner: ANIL

    def __call__(self, query_x: Tensor, present: Tensor | None = None) -> Tensor:
        """Outputs of each task's head on its queries, ``[T, Q, ...]`` -> ``[T, Q, N]``.

        Args:
            query_x: ``[T, Q, ...]``.
            present: bool ``[T, Q]``, the queries that the body sees; None for all of them. The
                outputs of the others have no meaning.

        Raises:
            TypeError: ``query_x`` is not a tensor, or ``present`` not bool.
            ValueError: ``query_x`` has another number of tasks, or ``present`` another shape.
        """
        check_dense("query_x", query_x)
        check_inputs("query_x", query_x, len(self))
        if present is not None:
            check_mask("present", present, query_x.shape[:2], query_x.device)
        params = self.layout.views(self.params)
        return self.learner._outputs(query_x, params["weight"], params.get("bias"), present)

    def __len__(self) -> int:
        return len(self.params)

    def task(self, index: int) -> dict[str, Tensor]:
        """The head's parameters of one task by name, for ``functional_call`` on the head."""
        return self.layout.views(self.params[index])


def _named(loss: Any, ways: int) -> str:
    """The name that ``linear_head`` has for a loss."""
    if not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    name = _LOSSES.get(lower_loss(loss)[0])
    if name is None:
        raise ValueError(
            "loss: expected F.cross_entropy, F.mse_loss or F.binary_cross_entropy_with_logits, or "
            f"the module of one of these, without options, got {loss!r}"
        )
    if name == "logistic" and ways != 1:
        raise ValueError(
            f"loss: expected a head of one output for the binary cross entropy, got {ways}"
        )
    return name


def _layout(head: nn.Linear) -> ParameterLayout:
    """The layout of the head's parameters, all of which must be trainable."""
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
    if frozen:
        raise ValueError(f"head: expected trainable parameters to adapt, got frozen ones, {frozen}")
    return ParameterLayout.of(head)


def _present(targets: Tensor) -> Tensor | None:
    """Which examples are present, bool ``[T, B]``; None if all are."""
    return None if targets.is_floating_point() else present_examples(targets)


def _binary_labels(name: str, y: Tensor) -> Tensor:
    """Targets ``[T, examples, 1]`` -> labels ``[T, examples]``."""
    labels = y.squeeze(2).long()
    if not (labels == y.squeeze(2)).all():
        raise ValueError(
            f"{name}: expected 0 or 1 for the binary cross entropy, or {ABSENT} for an absent "
            "example"
        )
    return labels
