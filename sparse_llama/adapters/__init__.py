"""LLaMA-Adapter v1 and v2 on a transformers LLaMA (arXiv:2303.16199, arXiv:2304.15010)."""
