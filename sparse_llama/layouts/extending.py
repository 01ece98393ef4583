"""Whether a longer layout of the same options begins with a shorter one."""

from sparse_llama.config.sparsity import (
    BigBirdSparsity,
    BSLongformerSparsity,
    FixedSparsity,
    MaskSparsity,
    Sparsity,
    VariableSparsity,
)


def extends(sparsity: Sparsity, num_blocks: int) -> bool:
    """Return whether every longer master begins, after causality, with the one of ``num_blocks``.

    A window, a band or a global block is where it is whatever follows. What is not:

    * a cut last window of ``fixed`` has its global blocks at its end, a longer one at their place. The first
      pattern's are there before causality only; so are single ones, without ``horizontal_global_attention``,
    * a mask ends where its file does,
    * a negative block index counts from the end,
    * random blocks are drawn from all blocks, or head after head: another length, other blocks. But
      unidirectional ``bigbird`` draws row after row from the blocks up to the row's own: one head's stay.
    """
    match sparsity:
        case FixedSparsity():
            is_upper = sparsity.num_global_blocks == 1 or sparsity.num_different_global_patterns == 1
            is_upper = is_upper and not sparsity.horizontal_global_attention
            return is_upper or num_blocks % sparsity.num_local_blocks == 0
        case VariableSparsity():
            return sparsity.num_random_blocks == 0 and _counts_from_the_start(sparsity)
        case BSLongformerSparsity():
            return _counts_from_the_start(sparsity)
        case BigBirdSparsity():
            is_one_head = not sparsity.different_layout_per_head
            in_order = sparsity.attention == "unidirectional" and is_one_head
            return sparsity.num_random_blocks == 0 or in_order
        case MaskSparsity():
            return False
        case _:
            return True


def _counts_from_the_start(sparsity: VariableSparsity | BSLongformerSparsity) -> bool:
    ends = sparsity.global_block_end_indices or ()
    return all(index >= 0 for index in (*sparsity.global_block_indices, *ends))
