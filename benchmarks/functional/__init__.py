"""The functional engine against the same algorithm in plain PyTorch, on networks of today."""
