"""Names of engines, and of the learners' attributes from which engines are built."""

from __future__ import annotations

ENGINES = ("auto", "program", "functional")

# Attributes from which the engine is built.
ENGINE_OPTIONS = frozenset(
    {
        "module",
        "loss",
        "inner_loss",
        "adapted_names",
        "steps",
        "first_order",
        "hvp_mode",
        "task_chunk",
        "norm_statistics",
        "rule",
        "outer",
        "engine",
        "memory",
        "cuda_graph",
    }
)
