"""Setting of the C library's allocator that speeds up training on a CPU."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's M_ names

_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process reuse freed blocks of up to 1 GiB instead of returning them to the system.

    Each training step frees its activations and allocates them again. The system would have to
    clear their pages anew: Conv4-64 on 360 images took 0.39 s per step, and 0.24 s with this.
    Does nothing if the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _BYTES)
