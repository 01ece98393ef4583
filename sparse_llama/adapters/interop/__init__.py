"""Adapter files of PEFT, lit-llama, litgpt and the original LLaMA-Adapter: recognised, read and written."""

from sparse_llama.adapters.interop.exchange import FOREIGN, named_base, read_foreign, recognise, write_foreign
from sparse_llama.adapters.interop.ours import ForeignAdapter

__all__ = ["FOREIGN", "ForeignAdapter", "named_base", "read_foreign", "recognise", "write_foreign"]
