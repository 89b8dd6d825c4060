"""What `import fastmeta` loads: it must not take longer than PyTorch itself."""

from __future__ import annotations

import subprocess
import sys

# torch.compile's tracer and compilers take a second, and pictures are drawn by few.
FORBIDDEN = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "PIL", "networkx")
MODULES = ("fastmeta", "fastmeta.compat.learn2learn", "fastmeta.cli")

PROGRAM = f"""
import importlib, sys, torch
for module in {MODULES}:
    importlib.import_module(module)
    print(module, [name for name in {FORBIDDEN} if name in sys.modules])
"""


def test_an_import_loads_neither_compilers_nor_pictures():
    """One after the other in one process: PyTorch's own import takes most of the time."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"{module} []" for module in MODULES]
