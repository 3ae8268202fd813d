"""What a machine has for the processes that share it."""

import os

import pytest
import torch

from fpdm.machine import cores, threads_each


@pytest.mark.parametrize("bound", [{0}, {1, 2}, set(range(64))], ids=len)
def test_only_the_cores_that_a_process_is_bound_to_are_its_own(bound, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: bound, raising=False)
    assert cores() == len(bound)


def test_where_nothing_is_bound_all_cores_are_taken(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6


def test_threads_are_shared_and_each_process_has_one_at_least():
    here = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert [threads_each(processes) for processes in (1, 2, 4, 6, 9)] == [6, 3, 1, 1, 1]
    finally:
        torch.set_num_threads(here)
