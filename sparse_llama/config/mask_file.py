"""The table of a ``mask`` layout: opened and checked, and packed into the block that an adapter keeps.

An adapter must attend as it was trained when the file is gone, so its block holds the table itself: in place
of a path a ``data:`` URL of the packed bits, compressed. numpy is imported only here, and only for a mask:
a command without one starts without it.
"""

import base64
import binascii
import io
import json
import os
import zlib
from typing import TYPE_CHECKING, Any

from sparse_llama.config.sparsity import MaskSparsity
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    Table = np.ndarray[Any, np.dtype[np.bool_]]

_PACKED = "data:application/zlib;base64,"
_WANTED = "a bool table of blocks, (N, N) or (heads, N, N)"


def open_mask(sparsity: MaskSparsity, num_blocks: int) -> "Table":
    """Return the (N, N) or (H, N, N) bool table, N at least ``num_blocks``; a file's stays on disk.

    Raises:
        ConfigError: there is no such file, it is no such table, or it is too small.
    """
    table = _read(sparsity.path)
    where = mask_name(sparsity)
    if table.dtype != bool:
        raise ConfigError(f"{where}: holds {table.dtype}; save {_WANTED}, such as mask.astype(bool)")
    if table.ndim not in (2, 3) or table.shape[-1] != table.shape[-2]:
        raise ConfigError(f"{where}: has shape {table.shape}; save {_WANTED}")
    size = table.shape[-1]
    if size < num_blocks:
        raise ConfigError(
            f"{where}: {size} blocks of {sparsity.block} on a side, but the layout has {num_blocks}; save a "
            f"larger table, or use sparse_llama.attention.master_length <= {size * sparsity.block}"
        )
    return table


def pack_mask(sparsity: MaskSparsity) -> MaskSparsity:
    """Return the block with the table itself in place of its path.

    Raises:
        ConfigError: there is no such file, or it is no such table.
    """
    import numpy as np

    if sparsity.path.startswith(_PACKED):
        return sparsity
    written = io.BytesIO()
    np.save(written, np.packbits(open_mask(sparsity, 1), axis=-1))
    packed = base64.b64encode(zlib.compress(written.getvalue(), 9)).decode("ascii")
    return sparsity.model_copy(update={"path": _PACKED + packed})


def mask_name(sparsity: MaskSparsity) -> str:
    """Return the key and the table's name, for messages."""
    if sparsity.path.startswith(_PACKED):
        return "sparse_attention.path: the adapter's own mask"
    return f"sparse_attention.path: {json.dumps(os.path.abspath(sparsity.path))}"


def _read(path: str) -> "np.ndarray[Any, Any]":
    import numpy as np

    if path.startswith(_PACKED):
        try:
            content = zlib.decompress(base64.b64decode(path.removeprefix(_PACKED), validate=True))
            bits = np.load(io.BytesIO(content), allow_pickle=False)
            return np.unpackbits(bits, axis=-1, count=bits.shape[-2]).view(bool)
        except (binascii.Error, zlib.error, ValueError, TypeError, IndexError, EOFError):
            raise ConfigError("sparse_attention.path: a damaged mask; give a .npy file") from None
    where = f"sparse_attention.path: {json.dumps(os.path.abspath(path))}"
    try:
        read = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file; name a .npy file of {_WANTED}") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}); name a .npy file") from None
    except (ValueError, EOFError):  # no .npy file, pickled objects, or cut short
        raise ConfigError(f"{where}: no .npy file; write one with numpy.save, {_WANTED}") from None
    if not isinstance(read, np.ndarray):
        read.close()
        raise ConfigError(f"{where}: an archive; write one table with numpy.save, {_WANTED}")
    return read
