"""The ground that the rest stands on: backend, dtypes, checks, layout, autograd helpers."""
