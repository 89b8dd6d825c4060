"""Meta-training: options, loop, checkpoints, evaluation and comparison of learners."""
