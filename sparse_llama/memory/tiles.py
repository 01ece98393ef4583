"""Token-wise parts of a layer, a tile of tokens at a time."""

from transformers import LlamaForCausalLM

from sparse_llama.config.settings import MemorySettings


def tile_layers(model: LlamaForCausalLM, settings: MemorySettings) -> None:
    """Make the norms and MLPs of ``model`` work on ``norm_tile`` and ``mlp_tile`` tokens at a time."""
    assert (settings.norm_tile, settings.mlp_tile) == (None, None)
