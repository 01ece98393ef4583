"""From a trained adapter to a folder that others can use, checked before it is published."""

from sparse_llama.export.write import Exported, export_merged, export_native

__all__ = ["Exported", "export_merged", "export_native"]
