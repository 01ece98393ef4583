"""Many processes, correct with one: ranks, collectives."""
