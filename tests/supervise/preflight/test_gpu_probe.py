from __future__ import annotations

import os

import pytest

from autoglm_resume.supervise.base import machine
from autoglm_resume.supervise.preflight import gpu_probe


def test_every_visible_gpu_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not machine.visible_gpus():
        pytest.skip("no GPU here")
    found, driver = gpu_probe.look(lambda pid: pid == os.getpid(), None)
    assert driver == ""
    assert found
    assert len(found) == machine.visible_gpus()
    assert all(gpu.error == "" and 0 < gpu.total >= gpu.used for gpu in found)
    found, _ = gpu_probe.look(lambda pid: False, "0,99")
    assert found
    assert [bool(gpu.error) for gpu in found] == [False, True]


def test_without_a_driver_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if machine.visible_gpus():
        pytest.skip("there are GPUs here")
    assert gpu_probe.look(lambda pid: False, None) == ((), "")
    assert gpu_probe.look(lambda pid: False, "0,1") == (None, "there is no driver")
    assert gpu_probe.look(lambda pid: False, "") == ((), "")
