"""Can this machine run sparse-llama, correctly? Checks in processes of their own, and a report."""
