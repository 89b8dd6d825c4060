"""Inner steps in segments: what is kept of them, and how the adjoint takes them again.

Of K steps the tape keeps theta_k and the rule's state at every ceil(sqrt(K))-th only. When the
adjoint comes to a segment it takes its steps again from there, and frees them as it goes back
(Chen 2016). So 2 sqrt(K) parameter vectors are alive at a time instead of K, for another gradient
a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from fastmeta.core.random_state import RandomState
from fastmeta.core.step_sizes import StepSizes
from fastmeta.engines.base import InnerLoopOptions
from fastmeta.engines.tape import LEFT_OUT, Tape
from fastmeta.rules.base import State, Step

# Takes the step from its inputs without a gradient, and records it: theta and the state after it.
Take = Callable[[Step], tuple[Tensor, State]]

SEGMENTS = "segments"


@dataclass(frozen=True)
class Segments:
    """K steps in segments.

    Attributes:
        steps: K.
        size: steps of a segment; the last may have fewer.

    Example:
        >>> from fastmeta.engines.base import InnerLoopOptions
        >>> segments = Segments.of(InnerLoopOptions(steps=10, memory="segments"))
        >>> segments.size, [k for k in range(10) if segments.start(k) == k]
        (4, [0, 4, 8])
    """

    steps: int
    size: int

    @classmethod
    def of(cls, options: InnerLoopOptions) -> Segments | None:
        """The segments of a loop; None: it is not in segments."""
        if options.memory != SEGMENTS or options.steps == 0:
            return None
        return cls(options.steps, math.ceil(math.sqrt(options.steps)))

    def start(self, k: int) -> int:
        """The first step of step k's segment."""
        return k - k % self.size

    def complete_from(self, at_once: bool) -> int:
        """The first step that the tape records in full; ``at_once``: the adjoint follows.

        It then begins with the last segment, which need not be taken again.
        """
        return self.start(self.steps - 1) if at_once else self.steps

    def keep(self, tape: Tape, at: Step, random: RandomState | None) -> None:
        """Record what has to be known to take a step again: for most, its random numbers."""
        tape.randoms[at.k] = random
        if at.k == self.start(at.k):
            tape.thetas[at.k] = at.theta
            if at.state:
                tape.states[at.k] = at.state

    def complete(
        self, tape: Tape, k: int, step_sizes: StepSizes, reads_gradients: bool, take: Take
    ) -> None:
        """Take the steps of a segment again, up to its last step k, which records them in full.

        ``reads_gradients``: whether the derivative of a step reads g_k.
        """
        start = self.start(k)
        theta, state = tape.thetas[start], tape.states.get(start, ())
        for j in range(start, k + 1):
            at = Step(j, theta, LEFT_OUT, step_sizes.at(j), state)
            if j == k and not reads_gradients:
                tape.thetas[k] = theta  # the derivative of the last step reads nothing else
                break
            with _replayed(tape.randoms[j]):
                theta, state = take(at)
        tape.complete_from = start


def _replayed(random: RandomState | None) -> AbstractContextManager[None]:
    return nullcontext() if random is None else random.replay()
