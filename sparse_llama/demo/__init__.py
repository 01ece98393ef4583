"""A demo in a box: an invented world, a tiny LLaMA that knows it, and data that teaches it to answer."""
