"""What is kept for the backward pass, and where."""
