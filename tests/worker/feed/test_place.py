"""A loader that begins before its session has resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoglm_resume.errors import NoAcceptableCheckpoint, UsageError
from tests.worker.alone import lonely
from tests.worker.test_session import Training, other_model


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    with lonely(tmp_path):
        yield


def test_what_deals_data_is_in_its_place_when_it_is_iterated_and_the_rest_at_resume() -> None:
    undisturbed = Training()
    undisturbed.run(9)
    expected = undisturbed.state()
    again = Training()
    begun = iter(again.sampler)
    again.model[0].reset_parameters()
    untouched = again.model[0].weight.clone()
    assert next(begun) == next(iter(undisturbed.sampler))
    assert torch.equal(again.model[0].weight, untouched)
    torch.rand(1)  # what a script draws on its way to the loop
    with pytest.raises(UsageError, match="before a loader of what is tracked"):
        again.session.track(late=torch.nn.Linear(1, 1))
    assert again.session.resume() == 9
    assert again.state() == expected


def test_a_checkpoint_that_was_refused_when_the_loader_began_is_refused_again() -> None:
    other, _ = other_model()
    for _ in range(2):
        with pytest.raises(NoAcceptableCheckpoint):
            next(iter(other.sampler))
    with pytest.raises(NoAcceptableCheckpoint):
        other.session.resume()
