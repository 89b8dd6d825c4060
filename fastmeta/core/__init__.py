"""Shared foundations: backend, dtypes, checks, parameter layout, autograd helpers."""
