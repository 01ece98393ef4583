"""A trained MLP (placed by the lead so that attach.py imports; the COST part replaces this file)."""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP


class AdaptedMLP(LlamaMLP):
    def __init__(self, base: LlamaMLP) -> None:
        nn.Module.__init__(self)
        self.config, self.hidden_size, self.intermediate_size = base.config, base.hidden_size, base.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            base.gate_proj,
            base.up_proj,
            base.down_proj,
            base.act_fn,
        )
