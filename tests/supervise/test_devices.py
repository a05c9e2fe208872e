from __future__ import annotations

import os

import pytest

from autoglm_resume.supervise import devices, node


def test_every_visible_gpu_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not node.visible_gpus():
        pytest.skip("no GPU here")
    found, driver = devices.look(lambda pid: pid == os.getpid(), None)
    assert driver == ""
    assert found
    assert len(found) == node.visible_gpus()
    assert all(gpu.error == "" and 0 < gpu.total >= gpu.used for gpu in found)
    found, _ = devices.look(lambda pid: False, "0,99")
    assert found
    assert [bool(gpu.error) for gpu in found] == [False, True]


def test_without_a_driver_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if node.visible_gpus():
        pytest.skip("there are GPUs here")
    assert devices.look(lambda pid: False, None) == ((), "")
    assert devices.look(lambda pid: False, "0,1") == (None, "there is no driver")
    assert devices.look(lambda pid: False, "") == ((), "")
