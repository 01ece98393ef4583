"""LLaMAs of random weights, and what each contender makes of one.

All contenders of a run lie over the same frozen weights: seven copies of a 7B model would fit no GPU.
"""

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.attention.interface import AttentionPlan, attach_attention
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.config.settings import AdapterSettings

Llamas = dict[str, LlamaForCausalLM]
PLAIN = "transformers"
"""The base as it is, frozen, with PyTorch's attention: what every ratio is over."""
NO_PEFT = "peft is not installed; pip install peft"
_LORA_RANK = 8
_PEFT_PROMPT = "PEFT adaption prompt"


def random_llama(
    shape: Shape, *, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """Return a frozen LLaMA with the weights that transformers draws, the same every time.

    Args:
        num_tokens: of the longest row.
    """
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=num_tokens,
        # the named ones may lie outside a small vocabulary
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), device:
        torch.manual_seed(0)
        llama = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return llama.requires_grad_(False).eval()


def copy_over(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a LLaMA with modules of its own over the weights of ``base``, which stay as they are."""
    own: dict[int, Any] = {
        id(one): nn.Parameter(one.detach(), requires_grad=False) for one in base.parameters()
    }
    return copy.deepcopy(base, own)


def adapt(llama: LlamaForCausalLM, settings: AdapterSettings) -> None:
    """Give ``llama`` this project's dense attention and adapters."""
    attach_attention(llama, AttentionPlan((None,) * llama.config.num_hidden_layers))
    attach_adapters(llama, settings, seed=0)


def contenders(base: LlamaForCausalLM, *, top_layers: int) -> tuple[Llamas, dict[str, str]]:
    """Return the LLaMAs whose training is compared, and those left out with the reason.

    Args:
        top_layers: how many layers the v2 adapter has that is on the top ones only.
    """
    num_layers = base.config.num_hidden_layers
    ours = {
        "v1": AdapterSettings(version="v1"),
        "v2": AdapterSettings(version="v2"),
        f"v2, top {top_layers} of {num_layers}": AdapterSettings(version="v2", top_layers=top_layers),
    }
    llamas: Llamas = {PLAIN: copy_over(base)}
    # With nothing to train there would be no backward pass: plain transformers gets one through every layer.
    llamas[PLAIN].model.embed_tokens.register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    for name, settings in ours.items():
        llamas[name] = copy_over(base)
        adapt(llamas[name], settings)
    if find_spec("peft") is None:
        return llamas, dict.fromkeys(_peft(None, num_layers), NO_PEFT)
    import peft  # optional

    with warnings.catch_warnings(
        action="ignore", category=FutureWarning
    ):  # of a name it takes from transformers
        for name, make in _peft(peft, num_layers).items():
            adapted: Any = peft.get_peft_model(copy_over(base), make())
            llamas[name] = adapted.get_base_model()
    return llamas, {}


def peft_adaption_prompt(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return ``base`` with PEFT's adaption prompts, as long as v1's, and where v1's are; PEFT must be
    installed."""
    import peft  # optional

    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        config = _peft(peft, base.config.num_hidden_layers)[_PEFT_PROMPT]()
        adapted: Any = peft.get_peft_model(base, config)
    return adapted.get_base_model()


def _peft(library: Any, num_layers: int) -> dict[str, Callable[[], Any]]:
    """Return what PEFT, the ``library``, is asked for; its adaption prompts are as long as v1's, and where
    v1's are."""
    settings = AdapterSettings(version="v1")
    prompts = {
        "adapter_len": settings.prompt_length,
        "adapter_layers": len(settings.prompt_layers(num_layers)),
    }

    def lora(modules: list[str] | str) -> Any:
        return library.LoraConfig(
            r=_LORA_RANK, lora_alpha=2 * _LORA_RANK, target_modules=modules, task_type="CAUSAL_LM"
        )

    return {
        _PEFT_PROMPT: lambda: library.AdaptionPromptConfig(**prompts, task_type="CAUSAL_LM"),
        "PEFT LoRA, q and v": lambda: lora(["q_proj", "v_proj"]),
        "PEFT LoRA, all linear": lambda: lora("all-linear"),
    }
