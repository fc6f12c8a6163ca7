import os

import torch

from convmixer_hub.machine import describe_machine


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 5, 7})
    assert describe_machine(torch.device("cpu")).startswith("3 CPU cores (")
