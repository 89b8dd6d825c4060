"""What `import fastmeta` loads: it must not take longer than PyTorch itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

# torch.compile's tracer and compilers take a second, and pictures are drawn by few.
FORBIDDEN = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "PIL", "networkx")


@pytest.mark.parametrize("module", ["fastmeta", "fastmeta.compat.learn2learn", "fastmeta.cli"])
def test_an_import_loads_neither_compilers_nor_pictures(module):
    program = (
        f"import sys, torch, {module}\nprint([name for name in {FORBIDDEN} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
