"""A decoder layer as one autograd function of three passes over groups of heads."""

from transformers import LlamaForCausalLM

from sparse_llama.config.settings import MemorySettings


def group_heads(model: LlamaForCausalLM, settings: MemorySettings) -> None:
    """Make every decoder layer of ``model`` work on one of ``head_groups`` groups of heads at a time."""
    assert settings.head_groups is None
