"""A team's jobs: each is done once, by several threads, and what goes wrong reaches the caller."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from sglang_orthrus.grammar.threads import ThreadTeam, available_cores


@pytest.mark.parametrize("num_jobs", [0, 1, 3, 4, 100])
def test_every_job_is_done_once_before_run_returns(num_jobs: int) -> None:
    done = list[int]()

    def slowly(job: int) -> None:
        time.sleep(0.001)
        done.append(job)

    team = ThreadTeam(4, "test")
    for _ in range(3):
        done.clear()
        team.run([partial(slowly, job) for job in range(num_jobs)])
        assert sorted(done) == list(range(num_jobs))


def test_as_many_threads_as_its_size_work_at_once() -> None:
    meeting = threading.Barrier(4, timeout=30)
    threads = set[int]()

    def meet() -> None:
        meeting.wait()
        threads.add(threading.get_ident())

    ThreadTeam(4, "test").run([meet] * 4)
    assert len(threads) == 4
    assert threading.get_ident() in threads


def test_a_team_of_one_is_the_caller() -> None:
    threads = list[int]()
    ThreadTeam(1, "test").run([lambda: threads.append(threading.get_ident())] * 5)
    assert threads == [threading.get_ident()] * 5


def test_started_jobs_go_on_beside_the_caller() -> None:
    gates = [threading.Event() for _ in range(4)]
    team = ThreadTeam(3, "test")
    jobs = team.start([partial(gate.wait, 60) for gate in gates], most=2)
    assert jobs.wait(0.0) == {0, 1, 2, 3}
    gates[1].set()
    gates[2].set()
    jobs.wait_for(2)
    assert jobs.wait(0.0) == {0, 3}
    team.run([lambda: None] * 5)  # the caller does what no helper is free for
    gates[0].set()
    gates[3].set()
    assert jobs.wait(60.0) == frozenset()
    jobs.wait_for(3)


def test_jobs_are_waited_for_as_long_as_they_end_one_after_the_other() -> None:
    """Behind the time to wait, only a job that keeps others waiting counts as late."""
    gate = threading.Event()
    quick = [partial(time.sleep, 0.001)] * 20
    assert ThreadTeam(2, "test").start(quick, most=1).wait(0.0, patience=60.0) == frozenset()
    jobs = ThreadTeam(2, "test").start([*quick, partial(gate.wait, 60)], most=1)
    assert jobs.wait(0.0, patience=1.0) == {20}
    gate.set()
    assert jobs.wait(60.0) == frozenset()


def test_a_long_job_keeps_no_other_waiting() -> None:
    gate, team = threading.Event(), ThreadTeam(4, "test")
    first = team.start([partial(gate.wait, 60)], most=1)
    while not team._busy:
        time.sleep(0.001)
    assert team.start([lambda: None] * 3, most=1).wait(60.0) == frozenset()
    assert first.wait(0.0) == {0}
    gate.set()


def test_a_process_ends_when_helpers_are_done() -> None:
    gate, team = threading.Event(), ThreadTeam(2, "test")
    jobs = team.start([partial(gate.wait, 60)], most=1)
    team.start([lambda: None], most=1)
    while not team._busy:
        time.sleep(0.001)
    team.finish(0.01)
    assert jobs.wait(0.0) == {0}, "not for ever"
    gate.set()
    team.finish()
    assert jobs.wait(0.0) == frozenset()


def test_what_a_started_job_raises_reaches_who_waits() -> None:
    def fail() -> None:
        raise ValueError("no")

    for wait in (lambda jobs: jobs.wait(60.0), lambda jobs: jobs.wait_for(1)):
        jobs = ThreadTeam(1, "test").start([fail, lambda: None], most=1)
        with pytest.raises(ValueError, match="no"):
            wait(jobs)
        assert jobs.wait(60.0) == frozenset()


@pytest.mark.parametrize("failing", [0, 7])
def test_a_problem_is_raised_when_all_others_are_done_and_the_team_works_on(failing: int) -> None:
    done = list[int]()

    def job(number: int) -> None:
        if number == failing:
            raise ValueError(str(number))
        time.sleep(0.001)
        done.append(number)

    team = ThreadTeam(3, "test")
    for _ in range(2):
        done.clear()
        with pytest.raises(ValueError, match=f"^{failing}$"):
            team.run([partial(job, number) for number in range(8)])
        assert sorted(done) == [number for number in range(8) if number != failing]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


V2, V1 = "0::/own/group", "4:memory:/x\n3:cpu,cpuacct:/own\n0::/"
V1_FOLDER = "sys/fs/cgroup/cpu,cpuacct"
CONTROL_GROUPS: dict[str, tuple[dict[str, str], float]] = {
    "none": ({}, 64),
    "no quota": ({"proc/self/cgroup": V2, "sys/fs/cgroup/own/group/cpu.max": "max 100000"}, 64),
    "two and a half": ({"proc/self/cgroup": V2, "sys/fs/cgroup/own/group/cpu.max": "250000 100000"}, 2),
    "less than one": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    "of an enclosing group": (
        {
            "proc/self/cgroup": V2,
            "sys/fs/cgroup/own/group/cpu.max": "max 100000",
            "sys/fs/cgroup/own/cpu.max": "300000 100000",
        },
        3,
    ),
    "path of the host": ({"proc/self/cgroup": "0::/docker/1234", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            f"{V1_FOLDER}/own/cpu.cfs_quota_us": "500000",
            f"{V1_FOLDER}/own/cpu.cfs_period_us": "100000",
        },
        5,
    ),
    "version 1, no quota": (
        {
            "proc/self/cgroup": V1,
            f"{V1_FOLDER}/cpu.cfs_quota_us": "-1",
            f"{V1_FOLDER}/cpu.cfs_period_us": "100000",
        },
        64,
    ),
}


@pytest.mark.parametrize("name", CONTROL_GROUPS)
def test_cores_follow_the_quota_of_control_groups(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = CONTROL_GROUPS[name]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert available_cores(write(tmp_path, files)) == expected


def test_cores_follow_the_affinity_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = CONTROL_GROUPS["path of the host"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    assert available_cores(write(tmp_path, files)) == 1
