"""The automatic engine: the task program if the module lowers to one, else the functional one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn

from fastmeta.core.trees import Tree
from fastmeta.engines.autograd import entry_point
from fastmeta.engines.base import Examples, InnerLoopOptions, MetaGradient, Minibatches, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.engine import ProgramEngine
from fastmeta.engines.program.lowering import Program
from fastmeta.engines.program.trace import LoweringError


@dataclass(frozen=True)
class AutoEngine:
    """Tries the program engine first and falls back to the functional engine.

    Methods do what the methods of ``FunctionalEngine`` do. The program engine raises LoweringError
    before it computes anything, so the functional engine starts afresh.

    Args:
        program: the engine to try first.
        functional: an engine of the same module, loss and options.
    """

    program: ProgramEngine
    functional: FunctionalEngine

    @property
    def module(self) -> nn.Module:
        return self.functional.module

    @property
    def options(self) -> InnerLoopOptions:
        return self.functional.options

    def with_steps(self, steps: int) -> AutoEngine:
        """The same engine with another number of inner steps."""
        return AutoEngine(self.program.with_steps(steps), self.functional.with_steps(steps))

    def parameters(self) -> Tensor:
        """The module's own trainable parameters as an arena ``[P]``, a differentiable copy."""
        return self.functional.parameters()

    @entry_point
    def adapt(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        support: Examples,
        batches: Minibatches | None = None,
    ) -> Tensor:
        """The parameters of every task after K steps, see ``FunctionalEngine.adapt``."""
        # Only LoweringError falls back: an argument that does not fit is the caller's to see.
        with suppress(LoweringError):
            return self.program.adapt(theta, lr, support, batches)
        return self.functional.adapt(theta, lr, support, batches)

    @entry_point
    def meta_loss(
        self,
        theta: Tensor | None,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> tuple[Tensor, Tree]:
        """The mean query loss after adaptation, see ``FunctionalEngine.meta_loss``."""
        with suppress(LoweringError):
            return self.program.meta_loss(theta, lr, batch, step_weights, batches)
        return self.functional.meta_loss(theta, lr, batch, step_weights, batches)

    @entry_point
    def meta_gradient(
        self,
        lr: float | Tensor,
        batch: TaskBatch,
        step_weights: Sequence[float] | Tensor | None = None,
        theta: Tensor | None = None,
        batches: Minibatches | None = None,
    ) -> MetaGradient:
        """The meta-loss with its gradient, see ``FunctionalEngine.meta_gradient``."""
        with suppress(LoweringError):
            return self.program.meta_gradient(lr, batch, step_weights, theta, batches)
        return self.functional.meta_gradient(lr, batch, step_weights, theta, batches)

    @entry_point
    def query_losses(
        self, theta: Tensor, query: Examples, gradient: bool = False
    ) -> tuple[Tensor, Tree, Tensor | None, dict[str, Tensor]]:
        """Each task's query loss at given parameters, see ``FunctionalEngine.query_losses``."""
        with suppress(LoweringError):
            return self.program.query_losses(theta, query, gradient)
        return self.functional.query_losses(theta, query, gradient)

    @entry_point
    def mixed_products(self, theta: Tensor, support: Examples, vector: Tensor) -> dict[str, Tensor]:
        """The mixed derivative times a vector, see ``FunctionalEngine.mixed_products``."""
        with suppress(LoweringError):
            return self.program.mixed_products(theta, support, vector)
        return self.functional.mixed_products(theta, support, vector)

    @entry_point
    def hvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Hessian of each task's loss times vectors, see ``FunctionalEngine.hvp``.

        If gradients are enabled and an argument requires one, the functional engine makes the
        product, which then has a graph.
        """
        with suppress(LoweringError):
            return self.program.hvp(theta, examples, vector)
        return self.functional.hvp(theta, examples, vector)

    @entry_point
    def ggnvp(self, theta: Tensor, examples: Examples, vector: Tensor) -> Tensor:
        """The Gauss-Newton matrix of each task's loss times vectors, as ``hvp`` otherwise."""
        with suppress(LoweringError):
            return self.program.ggnvp(theta, examples, vector)
        return self.functional.ggnvp(theta, examples, vector)

    @entry_point
    def outputs(self, theta: Tensor, x: Tree, present: Tensor | None = None) -> Tree:
        """The module's outputs ``[T, B, ...]``, see ``FunctionalEngine.outputs``."""
        # The program engine falls back by itself here: adapted parameters may need a graph.
        return self.program.outputs(theta, x, present)

    def explain(self, support: Examples | None = None) -> str:
        """Which engine runs, and how, in a few sentences."""
        program = self.program.program() if support is None else self.program.program(support)
        if isinstance(program, Program):
            return self.program.describe(program)
        # A required CUDA graph has no fallback, although the functional engine could run.
        required = self.program.program_options.cuda_graph is True
        raises = " cuda_graph=True: meta-losses raise ValueError." if required else ""
        return f"{self.functional.describe()} No task program: {program}.{raises}"
