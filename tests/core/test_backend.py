"""Seeing and choosing which implementation an op runs."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastmeta as fm
from fastmeta.core import backend
from fastmeta.ops import reference
from tests.helpers.assertions import require_kernels
from tests.helpers.case import CaseFactory

Rows = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def rows(device) -> Rows:
    make = CaseFactory(torch.float32, device)
    return make.randn(1, 2, 3), make.randn(1, 4, 3)


@pytest.fixture
def calls(monkeypatch):
    """Which implementation of pairwise_distance ran."""
    seen = []
    plain = reference.pairwise_distance
    monkeypatch.setattr(
        reference, "pairwise_distance", lambda *a: (seen.append("torch"), plain(*a))[1]
    )
    return seen


def test_the_environment_is_read_at_every_call(calls, monkeypatch, rows, device):
    monkeypatch.setenv("FASTMETA_BACKEND", "torch")
    fm.pairwise_distance(*rows)
    assert calls == ["torch"] and fm.backend_of("pairwise_distance", device) == "torch"
    monkeypatch.delenv("FASTMETA_BACKEND")
    require_kernels(device)
    fm.pairwise_distance(*rows)
    assert calls == ["torch"] and fm.backend_of("pairwise_distance", device) == "native"


def test_the_context_goes_before_the_environment_and_ends(calls, monkeypatch, rows, device):
    require_kernels(device)
    monkeypatch.setenv("FASTMETA_BACKEND", "torch")
    with fm.use_backend("native"):
        fm.pairwise_distance(*rows)
        with fm.use_backend("torch"):
            assert fm.backend_of("pairwise_distance", device) == "torch"
        assert fm.backend_of("pairwise_distance", device) == "native"
    assert calls == [] and fm.backend_of("pairwise_distance", device) == "torch"


def test_bad_names(monkeypatch, rows):
    with pytest.raises(ValueError, match="backend: expected one of native, torch, got 'cuda'"):
        fm.use_backend("cuda").__enter__()
    with pytest.raises(ValueError, match=r"op: expected one of .*, got 'conv'"):
        fm.backend_of("conv")
    monkeypatch.setenv("FASTMETA_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTMETA_BACKEND: expected one of native, torch"):
        fm.pairwise_distance(*rows)


def test_a_fallback_is_said_once(monkeypatch, rows, device):
    require_kernels(device)
    monkeypatch.setattr(backend, "KERNELS", {})
    backend._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fm.pairwise_distance(*rows)
        with fm.use_backend("torch"):
            fm.prototypes(rows[0], torch.zeros(1, 2, dtype=torch.int64, device=device), 1)
    messages = [str(w.message) for w in caught]
    assert messages == [
        "fastmeta runs in plain PyTorch: the extension was built without pairwise_distance for "
        f"{device}. Set FASTMETA_BACKEND=torch to accept that."
    ]
    assert fm.backend_of("pairwise_distance", device) == "torch"
    backend._warn.cache_clear()


def test_build_info_says_what_was_built():
    info = fm.build_info()
    if info["native"]:
        assert info["isa"] in ("avx512", "avx2", "portable") and isinstance(info["cuda"], bool)
    else:
        assert info["reason"]
