"""Attention cores: a definition, and the implementations that have to agree with it."""
