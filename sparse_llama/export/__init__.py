"""From a trained adapter to a folder that others can use, checked before it is published."""

from sparse_llama.export.foreign import ForeignExport, export_foreign
from sparse_llama.export.imported import Imported, import_adapter
from sparse_llama.export.write import Exported, export_merged, export_native

__all__ = [
    "Exported",
    "ForeignExport",
    "Imported",
    "export_foreign",
    "export_merged",
    "export_native",
    "import_adapter",
]
