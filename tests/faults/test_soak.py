"""Two thousand steps of the demo with faults injected throughout end with the same adapter as without one."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from fault_table import FaultsRecord
from faults.nursery import Nursery, Start, wait_for
from safetensors.torch import load_file

from sparse_llama.training.checkpoint import list_checkpoints, newest_intact, step_of

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 2_000, 20
FLAGS = ["--seq_length", "128", "--steps", str(STEPS), "--save_every", str(SAVE_EVERY), "--ignore_plan"]
FAULTS = ["kill -9", "SIGTERM", "time budget", "bit flip", "truncated file", "missing file", "drive full"]


def demo(folder: Path) -> Path:
    """Return the demo's document without the answers that it shows, which take most of its time."""
    document = json.loads((ROOT / "ds_configs" / "cpu_demo.json").read_text(encoding="utf-8"))
    document["sparse_llama"]["training"] = {"eval_every": 500, "samples": 0}
    path = folder / "demo.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def start(nursery: Nursery, folder: Path, *words: str, **faults: object) -> int:
    """Start the demo, or go on with it; return the process."""
    output_dir = folder / "run"
    begun = ["--resume"] if newest_intact(output_dir / "checkpoints") else ["--overwrite"]
    all_words = ["--ds_config", str(demo(folder)), *FLAGS, "--output_dir", str(output_dir), *begun, *words]
    return nursery.start(Start(all_words, str(folder / "log"), **faults))  # type: ignore[arg-type]


def tensors(output_dir: Path) -> dict[str, bytes]:
    read = load_file(output_dir / "adapter" / "adapter.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in read.items()}


def newest(output_dir: Path) -> int:
    return max(map(step_of, list_checkpoints(output_dir / "checkpoints")), default=0)


def curve(output_dir: Path) -> list[tuple[int, float]]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def damage(fault: str, output_dir: Path, draw: random.Random) -> None:
    """Damage a file of the newest checkpoint."""
    folder = list_checkpoints(output_dir / "checkpoints")[-1]
    path = draw.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if fault == "bit flip":
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif fault == "truncated file":
        path.write_bytes(content[:place])
    else:
        path.unlink()


def inject(fault: str, nursery: Nursery, folder: Path, draw: random.Random) -> None:
    """Let the run make some steps, one fault, and end before it is done."""
    output_dir = folder / "run"
    if fault == "drive full":
        first = draw.randrange(1, 4)
        process = start(
            nursery, folder, fail_at_call=("sparse_llama.training.checkpoint.save_file", first, first + 1)
        )
    elif fault == "time budget":
        process = start(nursery, folder, "--time_budget_s", "12")
    else:
        process = start(nursery, folder)
    before = newest(output_dir)
    if fault == "time budget":
        assert nursery.wait(process) in (0, 4)
        return
    target = before + draw.randrange(2, 5) * SAVE_EVERY
    assert wait_for(lambda: newest(output_dir) >= target, 300), f"{fault}: every start goes on"
    time.sleep(draw.uniform(0, 1))
    os.kill(process, signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
    assert nursery.wait(process) in (-9, 0, 4)
    if fault in ("bit flip", "truncated file", "missing file"):
        damage(fault, output_dir, draw)


def test_a_soak_of_two_thousand_steps(nursery: Nursery, tmp_path: Path, faults_record: FaultsRecord):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert nursery.wait(start(nursery, whole)) == 0, (whole / "log").read_text(encoding="utf-8")[-3000:]
    draw, counts = random.Random(20), dict.fromkeys(FAULTS, 0)
    while newest(broken / "run") < STEPS - 6 * SAVE_EVERY:
        fault = min(FAULTS, key=lambda one: (counts[one], draw.random()))
        inject(fault, nursery, broken, draw)
        counts[fault] += 1
    assert nursery.wait(start(nursery, broken)) == 0, (broken / "log").read_text(encoding="utf-8")[-3000:]
    is_same = tensors(whole / "run") == tensors(broken / "run") and curve(whole / "run") == curve(
        broken / "run"
    )
    for fault, count in counts.items():
        faults_record(f"soak: {fault}", injected=count, survived=count if is_same else 0)
    assert min(counts.values()) >= 2
    assert len(curve(broken / "run")) == STEPS
    assert is_same
