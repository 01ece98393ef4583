"""Which blocks may attend to which: DeepSpeed's layouts as row intervals."""

from sparse_llama.layouts.extending import extends
from sparse_llama.layouts.layout import Layout, build_layout

__all__ = ["Layout", "build_layout", "extends"]
