"""What bases the programs of LLaMA 1's time can have."""

from transformers import LlamaConfig

from sparse_llama.adapters.interop.ours import head_dim, num_kv_heads


def first_llama_misfit(base: LlamaConfig) -> str | None:
    """Return what keeps ``base`` out of code written for LLaMA 1, as the end of a sentence; None if
    nothing."""
    heads, kv_heads = base.num_attention_heads, num_kv_heads(base)
    if kv_heads != heads:
        return f"its code has as many key/value as query heads, this base has {kv_heads} and {heads}"
    if head_dim(base) * heads != base.hidden_size:
        return (
            f"its heads are hidden_size / num_attention_heads = {base.hidden_size / heads:g} wide, this "
            f"base's are {head_dim(base)}"
        )
    if base.attention_bias or base.mlp_bias:
        return "its linear layers have no biases of the base's, this base has some"
    return None


def rope_differences(base: LlamaConfig) -> dict[str, tuple[object, object]]:
    """Return, by key, this base's and LLaMA 1's rotary settings where they differ."""
    rope = base.rope_parameters or {}
    found = {
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_theta": (rope.get("rope_theta", 10000.0), 10000.0),
    }
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def difference_notices(program: str, differences: dict[str, tuple[object, object]]) -> tuple[str, ...]:
    """Return what ``program`` computes with in place of this base's values."""
    told = [f"{key} {theirs} (this base: {ours})" for key, (ours, theirs) in differences.items()]
    return (f"{program} itself computes with {', '.join(told)}: it gives other outputs",) if told else ()
