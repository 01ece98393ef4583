"""What a run needs before it starts: memory by component, time, and the longest context that fits."""
