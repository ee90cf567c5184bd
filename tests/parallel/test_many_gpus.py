"""The benchmark for several GPUs, rehearsed: its arithmetic, and that it tells a wrong layout from a right one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from many_gpus import Job, covered, judge, merged, numbers_jobs, run_job, scaling_jobs, speed_jobs


def test_time_under_compute():
    assert merged([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert covered([(0, 3), (5, 6)], [(1, 2), (2.5, 5.5)]) == pytest.approx(1 + 0.5 + 0.5)
    assert covered([(0, 1)], []) == 0


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_layouts_fit_the_ranks(gpus):
    jobs = [*numbers_jobs(gpus), *speed_jobs(gpus), *scaling_jobs(gpus)]
    for job in jobs:
        sizes = job.sizes
        assert job.ranks % (sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)) == 0
        assert job.ranks <= gpus
    if gpus == 8:
        assert {"tp2 pp2 cp2 sp", "ep4 tp2 sp", "zero3", "pp2 virtual"} <= {job.name for job in jobs}


def test_a_wrong_layout_is_named():
    common = dict(part="numbers", model="small", lengths=(48, 16), batch=2, dtype="float32")
    jobs = [Job(name="one process", ranks=1, **common), Job(name="tp2", ranks=2, sizes={"tp": 2}, **common)]
    results = [run_job(job, rehearse=True, trace=None, timeout=120) for job in jobs]
    assert judge(results) == []
    assert results[1]["result"]["difference"] < 1e-5
    results[1]["result"]["grad_norms"][1] *= 1.001
    assert judge(results) == ["numbers small float32 tp2: differs by 1.00e-03"]
    failed = run_job(dataclasses.replace(jobs[1], sizes={"tp": 3}), rehearse=True, trace=None, timeout=60)
    assert "tp2: " in judge([failed])[0]
