"""DeepSpeed's own offload of checkpoint inputs, to measure ours beside.

``CheckpointHiddenStatesOffload`` of DeepSpeed 0.19.8
(deepspeed/runtime/activation_checkpointing/offload_activations.py) marks the inputs of transformers'
checkpointed layers while it is entered. It moves nothing on a CPU.
"""

from contextlib import AbstractContextManager
from typing import Any


def deepspeed_offload() -> AbstractContextManager[Any]:
    """Return the context that a forward and its backward pass run in; one for each step."""
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        get_checkpoint_hidden_states_offloading_ctx_manager,
    )

    return get_checkpoint_hidden_states_offloading_ctx_manager()
