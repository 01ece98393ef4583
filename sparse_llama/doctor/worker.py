"""The process that looks: does the checks it is given in order, and tells of each as it begins and ends.

    python -m sparse_llama.doctor.worker FD OPTIONS CHECK ...

What it tells are lines of JSON on the file descriptor FD; standard output belongs to libraries, which print
there. A check that raises is the last one: what it has left behind, a broken CUDA context perhaps, would be
the next one's trouble. Who started the process then starts another for the rest.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from sparse_llama.doctor.checks import JOB
from sparse_llama.doctor.commands import last_line
from sparse_llama.doctor.findings import Finding

Tell = Callable[[str], None]


def main(descriptor: int, options: dict[str, bool], names: list[str]) -> None:
    """Do the checks called ``names``."""
    with os.fdopen(descriptor, "w", encoding="utf-8") as channel:

        def send(**message: Any) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        for name in names:
            send(begin=name)
            try:
                findings = list(find(name, options, lambda text: send(note=text)))
            except Exception as error:  # whatever it is, it is a finding
                told = f"{type(error).__name__}: {last_line(str(error))}"
                findings = [Finding(name, "fail", told, "report this with the text below")]
                send(findings=[asdict(finding) for finding in findings], is_last=True)
                return
            send(findings=[asdict(finding) for finding in findings], is_last=False)


def find(name: str, options: dict[str, bool], tell: Tell) -> Iterable[Finding]:
    """Return what the check called ``name`` finds. Each imports what it looks at."""
    if name == "devices":
        from sparse_llama.doctor.devices import check_devices

        return check_devices()
    if name == "memory":
        from sparse_llama.doctor.memory import check_memory

        return check_memory()
    if name.startswith("gradients: "):
        from sparse_llama.doctor.gradients import check_gradients

        return [check_gradients(name.removeprefix("gradients: "))]
    if name == JOB or name.startswith("deepspeed, "):
        from sparse_llama.doctor import launcher

        return [launcher.check_job() if name == JOB else launcher.check_launcher(int(name.split()[1]))]
    if name in ("versions", "imports", "torch's CUDA"):
        from sparse_llama.doctor import software

        if name == "versions":
            return software.check_versions()
        return software.check_imports() if name == "imports" else [software.check_torch()]
    return _find_of_ops(name, options, tell)


def _find_of_ops(name: str, options: dict[str, bool], tell: Tell) -> Iterable[Finding]:
    from sparse_llama.doctor import ops

    if name == "compilers":
        return ops.check_compilers()
    if name == "locks":
        return ops.check_locks()
    op = ops.find_op(name.removeprefix("op "))
    if op is None:
        return []
    return [ops.check_op(op, tell, builds=not options["skip_builds"], loads_all=options["all_ops"])]


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
