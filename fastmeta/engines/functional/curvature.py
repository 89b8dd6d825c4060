"""Hessian and Gauss-Newton products of any module's loss, in chunks of tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.curvature_products import gauss_newton_products, hessian_products
from fastmeta.core.derivatives import derivative
from fastmeta.core.inner_step import inner_step
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import Tree, concatenated, map_tensors
from fastmeta.engines.base import Examples, InnerLoopOptions, Loss
from fastmeta.engines.functional.label_checks import present_examples
from fastmeta.engines.functional.task_module import TaskModule, losses_of_outputs


class TaskLosses(NamedTuple):
    """Each task's loss as a function of its parameters."""

    layout: ParameterLayout
    task_module: TaskModule
    loss: Loss

    def products(
        self,
        options: InnerLoopOptions,
        theta: Tensor,
        examples: Examples,
        vector: Tensor,
        gauss_newton: bool,
    ) -> Tensor:
        """``H v``, or ``J' H_L J v``, in the shape of ``vector``: ``[T, P]`` or ``[K, T, P]``.

        Args:
            options: ``hvp_mode`` and ``task_chunk`` count.
            theta: ``[T, P]``.
            examples: ``[T, B, ...]``.
            vector: ``[T, P]``, or many, ``[K, T, P]``.
            gauss_newton: whether to leave the curvature of the module out.
        """
        product = self._gauss_newton if gauss_newton else self._hessian
        # Norms with a row of parameters a step use row 0: no step has been taken.
        with self.task_module.conditions(), inner_step(0):
            chunks = [
                product(theta[tasks], examples.of_tasks(tasks), vector[..., tasks, :], options)
                for tasks in options.chunks(len(theta))
            ]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, -2)

    def gradients(
        self, options: InnerLoopOptions, theta: Tensor, examples: Examples
    ) -> tuple[Tensor, Tensor, Tree]:
        """The gradients ``[T, P]``, the losses and the detached outputs; ``task_chunk`` counts.

        With gradients enabled, gradients and losses have a graph.
        """
        has_graph = torch.is_grad_enabled()
        theta = theta.expand(examples.tasks, self.layout.numel)
        if not (has_graph and theta.requires_grad):
            theta = theta.detach().requires_grad_()
        chunks = []
        with self.task_module.conditions(), inner_step(0), torch.enable_grad():
            for tasks in options.chunks(len(theta)):
                params, part = self.layout.views(theta[tasks]), examples.of_tasks(tasks)
                losses, outputs = self.task_module.losses(params, part, self.loss)
                ones, sources = torch.ones_like(losses), list(params.values())
                grads = derivative([losses], [ones], sources, create_graph=has_graph)
                named = dict(zip(params, grads, strict=True))
                detached = map_tensors(Tensor.detach, outputs)
                chunks.append((self.layout.flatten(named), losses, detached))
        gradients, values, outputs = map(concatenated, zip(*chunks, strict=True))
        return gradients, values if has_graph else values.detach(), outputs

    def _hessian(
        self, theta: Tensor, examples: Examples, vector: Tensor, options: InnerLoopOptions
    ) -> Tensor:
        def total(theta: Tensor) -> Tensor:
            params = self.layout.views(theta)
            return self.task_module.losses(params, examples, self.loss)[0].sum()

        many = vector.ndim == 3
        product: Tensor = hessian_products(total, theta, vector, options.hvp_mode, many)
        return product

    def _gauss_newton(
        self, theta: Tensor, examples: Examples, vector: Tensor, options: InnerLoopOptions
    ) -> Tensor:
        x, y, _, weight = examples
        present = present_examples(self.loss, y, weight, dims=2)

        def outputs_at(theta: Tensor) -> Tree:
            params = self.layout.views(theta)
            return self.task_module.outputs(params, x, examples.x_name, present)

        def total(outputs: Tree) -> Tensor:
            return losses_of_outputs(self.loss, outputs, y, weight).sum()

        many = vector.ndim == 3
        product: Tensor = gauss_newton_products(
            outputs_at, total, theta, vector, options.hvp_mode, many
        )
        return product
