"""The commands behind ``launch/``: of each its parser, and the call that does it.

Nothing imports torch before the configuration is checked: ``--help`` and mistakes answer in a fraction of a
second.
"""

from sparse_llama.cli.benchmark import benchmark, benchmark_parser
from sparse_llama.cli.doctor import doctor, doctor_parser
from sparse_llama.cli.entry import is_main, main, world_size
from sparse_llama.cli.evaluation import evaluate, evaluate_parser
from sparse_llama.cli.flags import Parser, add_model_flags, add_run_flags, overrides, parser
from sparse_llama.cli.imports import import_adapter, import_adapter_parser
from sparse_llama.cli.inspection import inspect_data, inspect_data_parser
from sparse_llama.cli.layouts import show_layout, show_layout_parser
from sparse_llama.cli.models import export, export_parser, generate, generate_parser
from sparse_llama.cli.planning import plan_memory, plan_memory_parser
from sparse_llama.cli.probe import probe_memory, probe_memory_parser
from sparse_llama.cli.study import study, study_parser
from sparse_llama.cli.training import train, train_parser

__all__ = [
    "Parser",
    "add_model_flags",
    "add_run_flags",
    "benchmark",
    "benchmark_parser",
    "doctor",
    "doctor_parser",
    "evaluate",
    "evaluate_parser",
    "export",
    "export_parser",
    "generate",
    "generate_parser",
    "import_adapter",
    "import_adapter_parser",
    "inspect_data",
    "inspect_data_parser",
    "is_main",
    "main",
    "overrides",
    "parser",
    "plan_memory",
    "plan_memory_parser",
    "probe_memory",
    "probe_memory_parser",
    "show_layout",
    "show_layout_parser",
    "study",
    "study_parser",
    "train",
    "train_parser",
    "world_size",
]
