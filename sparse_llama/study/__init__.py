"""Several runs on the same data and hyperparameters, measured alike and compared in one report."""
