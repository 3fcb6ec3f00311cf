"""A crew's jobs: each is done once, by several threads, and what goes wrong reaches the caller."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from sglang_orthrus.crew import Crew


@pytest.mark.parametrize("num_jobs", [0, 1, 3, 4, 100])
def test_every_job_is_done_once_before_run_returns(num_jobs: int) -> None:
    done = list[int]()

    def slowly(job: int) -> None:
        time.sleep(0.001)
        done.append(job)

    crew = Crew(4, "test")
    for _ in range(3):
        done.clear()
        crew.run([partial(slowly, job) for job in range(num_jobs)])
        assert sorted(done) == list(range(num_jobs))


def test_as_many_threads_as_its_size_work_at_once() -> None:
    meeting = threading.Barrier(4, timeout=30)
    threads = set[int]()

    def meet() -> None:
        meeting.wait()
        threads.add(threading.get_ident())

    Crew(4, "test").run([meet] * 4)
    assert len(threads) == 4
    assert threading.get_ident() in threads


def test_a_crew_of_one_is_the_caller() -> None:
    threads = list[int]()
    Crew(1, "test").run([lambda: threads.append(threading.get_ident())] * 5)
    assert threads == [threading.get_ident()] * 5


@pytest.mark.parametrize("failing", [0, 7])
def test_a_problem_is_raised_when_all_others_are_done_and_the_crew_works_on(failing: int) -> None:
    done = list[int]()

    def job(number: int) -> None:
        if number == failing:
            raise ValueError(str(number))
        time.sleep(0.001)
        done.append(number)

    crew = Crew(3, "test")
    for _ in range(2):
        done.clear()
        with pytest.raises(ValueError, match=f"^{failing}$"):
            crew.run([partial(job, number) for number in range(8)])
        assert sorted(done) == [number for number in range(8) if number != failing]
