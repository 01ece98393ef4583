"""The training run: DeepSpeed engine, loop, checkpoints, metrics, progress."""
