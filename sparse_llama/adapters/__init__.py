"""LLaMA-Adapter v1 and v2 on a transformers LLaMA (arXiv:2303.16199, arXiv:2304.15010)."""

from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.adapters.bank import active_adapters, delete_adapter, disable_adapters, set_adapter
from sparse_llama.adapters.stored import load_adapter, save_adapter
from sparse_llama.config.settings import AdapterSettings as AdapterConfig

__all__ = [
    "AdapterConfig",
    "active_adapters",
    "attach_adapters",
    "delete_adapter",
    "disable_adapters",
    "load_adapter",
    "save_adapter",
    "set_adapter",
]
