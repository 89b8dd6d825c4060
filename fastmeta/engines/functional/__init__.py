"""The functional engine, for any module: autograd and vmap over tasks."""
