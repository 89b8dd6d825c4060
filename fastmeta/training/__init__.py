"""Meta-training: config, loop, checkpoints, evaluation, comparison."""
