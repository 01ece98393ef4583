"""``kill -9`` at a hundred moments of a run: no published step is lost, and every restart goes on."""

import random
import time
from pathlib import Path

import pytest
from fault_table import FaultsRecord
from faults.nursery import Nursery, wait_for
from faults.training_jobs import Jobs

pytestmark = pytest.mark.faults
STEPS = 400
LONG = {
    "sparse_llama": {
        "seq_length": 288,
        "training": {"steps": STEPS, "samples": 0, "save_every": 1, "eval_every": 40, "keep_last": 2},
    }
}
"""A save for every step: about half of the time is spent in saves."""
PLACES = [
    *(("os.fsync", number) for number in range(1, 11)),
    *(("pathlib.Path.rename", number) for number in range(1, 5)),
    *(("pathlib.Path.replace", number) for number in range(1, 7)),
    *(("sparse_llama.training.checkpoint.save_file", number) for number in (1, 2)),
    *(("sparse_llama.training.checkpoint.write_durably", number) for number in (1, 2)),
    *(("shutil.rmtree", number) for number in range(1, 9)),
]
"""Calls of a save, and of the deletion of an old checkpoint, from the first save on."""
RANDOM_MOMENTS = 100 - len(PLACES)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(nursery, workplace, tmp_path_factory.mktemp("whole"), LONG)
    assert jobs.run() == [0], jobs.log.read_text(encoding="utf-8")
    return jobs


def test_a_hundred_kills_lose_no_published_step(
    nursery: Nursery, workplace: Path, tmp_path: Path, whole: Jobs, faults_record: FaultsRecord
):
    jobs, draw = Jobs(nursery, workplace, tmp_path, LONG), random.Random(8)
    survived, published = 0, 0
    for place in PLACES:
        assert jobs.run(kill_at_call=place) == [-9], f"{place} was not reached"
        assert jobs.damaged() == [], place
        assert jobs.newest_step() >= published, place
        published, survived = jobs.newest_step(), survived + 1
    faults_record("kill -9 inside a save", injected=len(PLACES), survived=survived)
    survived = 0
    for number in range(RANDOM_MOMENTS):
        jobs.start()
        begun = jobs.newest_step()
        assert wait_for(lambda begun=begun: jobs.newest_step() > begun), "every restart goes on"
        time.sleep(draw.uniform(0, 0.25))
        published = jobs.newest_step()
        statuses = jobs.kill()
        assert statuses in ([-9], [0])
        assert jobs.damaged() == [], number
        assert jobs.newest_step() >= published, number
        survived += 1
    faults_record("kill -9 at a random moment", injected=RANDOM_MOMENTS, survived=survived)
    assert jobs.run() == [0]
    assert jobs.result() == whole.result()
