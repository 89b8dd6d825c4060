from __future__ import annotations

from tests.helpers.skips import EMULATED

collect_ignore_glob = (
    [] if EMULATED else ["test_*.py"]
)  # `python -m tests.cuda_emulation` runs them
