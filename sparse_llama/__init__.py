"""Fine-tune a frozen LLaMA with LLaMA-Adapter v1 or v2, at context lengths that used to run out of memory."""

__version__ = "0.1.0"
