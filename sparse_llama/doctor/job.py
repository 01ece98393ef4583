"""The ranks of a job under one report: each looks for itself, and the main one hears from all."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sparse_llama.distributed import ranks
from sparse_llama.doctor.checks import Check
from sparse_llama.doctor.findings import Finding

Found = dict[str, list[Finding]]
WORKER_ENVIRONMENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
"""The port of the job is that of ``Job``: those who look on its ranks meet there, as under torchrun, and make
no store of their own."""
_MEET_S = 120.0
_OTHERS_S = 300.0  # for the other ranks' last words, once the main one has finished


class Job:
    """The job of several ranks that this process is in. Every rank makes one, before it looks at anything."""

    def __init__(self, address: str, port: int) -> None:
        self._store = TCPStore(
            address,
            port,
            is_master=ranks.is_main(),
            timeout=timedelta(seconds=_MEET_S),
            wait_for_workers=False,
        )

    def send(self, found: Found) -> None:
        """Leave this rank's findings for the main one."""
        text = json.dumps({section: [asdict(one) for one in rows] for section, rows in found.items()})
        self._store.set(_key(ranks.rank()), text)

    def merge(self, found: Found) -> Found:
        """Return the main rank's findings with those of the others that differ."""
        others: dict[int, Found] = {}
        for rank in range(1, ranks.world_size()):
            try:
                self._store.wait([_key(rank)], timedelta(seconds=_OTHERS_S))
                others[rank] = _read(json.loads(self._store.get(_key(rank))))
            except DistError:
                told = f"has said nothing for {_OTHERS_S:.0f} s"
                silent = Finding(f"rank {rank}", "fail", told, "look at its own output, and at its host")
                found = {**found, "ranks": [*found.get("ranks", []), silent]}
        return merge(found, others)


def own_share(checks: list[Check], *, is_gpu: bool) -> list[Check]:
    """Return the checks that are this rank's: a GPU of its own is each rank's, the rest the host's."""
    if ranks.is_main():
        return checks
    if ranks.local_rank() == 0:
        return [check for check in checks if check.place != "main"]
    return [
        check
        for check in checks
        if check.place == "rank" and (is_gpu or not check.name.startswith("gradients"))
    ]


def merge(found: Found, others: Mapping[int, Found]) -> Found:
    """Return ``found``, of the main rank, with every row of another rank that says something else."""
    merged = {section: list(rows) for section, rows in found.items()}
    for rank, theirs in sorted(others.items()):
        for section, rows in theirs.items():
            known = {one.name: one for one in found.get(section, [])}
            for one in rows:
                mine = known.get(one.name)
                is_same = mine is not None and mine.status == one.status
                if is_same and (one.varies or mine == one):
                    continue
                merged.setdefault(section, []).append(replace(one, name=f"{one.name}, rank {rank}"))
    return merged


def _key(rank: int) -> str:
    return f"doctor/{rank}"


def _read(document: dict[str, list[dict[str, Any]]]) -> Found:
    return {section: [Finding(**one) for one in rows] for section, rows in document.items()}
