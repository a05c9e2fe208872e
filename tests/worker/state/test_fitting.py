"""Loading a checkpoint into a model that has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import CheckpointError, ModelMismatch, ObjectMismatch
from autoglm_resume.events import PartlyRestored
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.state.fitting import Loading, fitted

ID = checkpoint_id(3, "a0")


class Net(torch.nn.Module):
    """Layers by name and width, in the order they are given."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, torch.nn.Linear(4, width))


def objects_of(net: Net, lr: float = 0.1) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    return {"model": net, "optimizer": optimizer}


def structure_of(net: Net) -> Any:
    return capture.structure_of({f"model.{k}": v for k, v in net.state_dict().items()})


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Net, restore.RestoredPart]:
    """A model of a first and a second layer after a step, and its checkpoint."""
    net = Net(first=4, second=3)
    tracked = objects_of(net, lr=0.5)
    sum(p.sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    tracked["optimizer"].step()
    states = {name: obj.state_dict() for name, obj in tracked.items()}
    snapshot = capture.take(states, id=ID, rank=0, world_size=1, model=structure_of(net))
    store = Store(tmp_path)
    PartWriter(store).persist(snapshot)
    return net, restore.read(store, store.directory(ID), 0)


def loaded(
    restored: restore.RestoredPart, objects: dict[str, Any], check_model: bool = True, **how: Any
) -> Loading:
    checkpoint = Checkpointing("nowhere", **how)
    settings = Settings(0, 1, checkpoint, None, check_model, (), "a1", None)
    loading = fitted(ID, restored, objects, structure_of(objects["model"]), settings)
    loading.into(objects)
    return loading


def test_a_renamed_model_is_loaded_whole(trained: tuple[Net, restore.RestoredPart]) -> None:
    old, restored = trained
    net = Net(begin=4, end=3)
    objects = objects_of(net)
    with pytest.raises(ModelMismatch, match=r"only in the checkpoint: model\.first\.bias"):
        loaded(restored, objects)
    loading = loaded(restored, objects, rename={"first": "begin", "model.second": "model.end"})
    assert not loading.partial
    assert torch.equal(net.begin.weight, old.first.weight)  # type: ignore[arg-type,union-attr]
    assert objects["optimizer"].state_dict()["state"][0]["step"] == 1


def test_names_that_changed_places_are_not_changed_again(
    trained: tuple[Net, restore.RestoredPart],
) -> None:
    old, restored = trained
    net = Net(first=4, second=3)
    loaded(restored, objects_of(net), rename={"first": "second", "second": "first"})
    assert torch.equal(net.first.weight, old.first.weight)  # type: ignore[arg-type,union-attr]


def test_parameters_in_another_order_would_get_each_others_moments(
    trained: tuple[Net, restore.RestoredPart],
) -> None:
    _, restored = trained
    rename = {"first": "end", "second": "begin"}
    with pytest.raises(ObjectMismatch, match=r"begin\.weight on; .* after checkpoint\.rename"):
        loaded(restored, objects_of(Net(begin=3, end=4)), rename=rename)
    objects = objects_of(Net(begin=3, end=4))
    loading = loaded(restored, objects, rename=rename, strict=False)
    assert loading.said() == PartlyRestored(without_state=("optimizer",))


@pytest.fixture
def like_layers(tmp_path: Path) -> restore.RestoredPart:
    """A checkpoint of two layers of one shape, the second of which was hardly trained."""
    net = Net(first=4, second=4)
    tracked = objects_of(net)
    (net.first.weight.sum() + net.second.weight.sum() / 8).backward()  # type: ignore[operator,union-attr]
    tracked["optimizer"].step()
    states = {name: obj.state_dict() for name, obj in tracked.items()}
    snapshot = capture.take(states, id=ID, rank=0, world_size=1, model=structure_of(net))
    store = Store(tmp_path)
    PartWriter(store).persist(snapshot)
    return restore.read(store, store.directory(ID), 0)


@pytest.mark.parametrize("check_model", [True, False])
def test_layers_that_change_places_under_their_names_are_refused(
    like_layers: restore.RestoredPart, check_model: bool
) -> None:
    objects = objects_of(Net(second=4, first=4))
    before = objects["model"].first.weight.detach().clone()
    assert structure_of(objects["model"]).hash == structure_of(Net(first=4, second=4)).hash
    with pytest.raises(ObjectMismatch, match=r"another one from model\.second\.weight on; it k"):
        loaded(like_layers, objects, check_model=check_model)
    assert torch.equal(objects["model"].first.weight, before)


def test_layers_that_change_places_go_on_without_moments_if_the_job_says_so(
    like_layers: restore.RestoredPart,
) -> None:
    objects = objects_of(Net(second=4, first=4))
    loading = loaded(like_layers, objects, strict=False)
    assert loading.without_state == ("optimizer",)
    assert objects["optimizer"].state_dict()["state"] == {}
    assert torch.equal(objects["model"].first.weight, like_layers.states["model"]["first.weight"])


def test_the_order_of_layers_is_nobodys_business_without_an_optimizer(
    like_layers: restore.RestoredPart,
) -> None:
    net = Net(second=4, first=4)
    assert not loaded(like_layers, {"model": net}).partial
    assert torch.equal(net.first.weight, like_layers.states["model"]["first.weight"])  # type: ignore[arg-type,union-attr]


def test_what_fits_is_loaded_and_the_rest_is_listed(
    trained: tuple[Net, restore.RestoredPart], capsys: pytest.CaptureFixture[str]
) -> None:
    old, restored = trained
    net = Net(first=4, second=5)
    objects = {**objects_of(net), "extra": torch.nn.Linear(1, 1)}
    fresh = net.second.weight.detach().clone()  # type: ignore[operator,union-attr]
    with pytest.raises(CheckpointError, match="this script also tracks extra"):
        loaded(restored, objects)
    loading = loaded(restored, objects, strict=False)
    assert torch.equal(net.first.weight, old.first.weight)  # type: ignore[arg-type,union-attr]
    assert torch.equal(net.second.weight, fresh)  # type: ignore[arg-type,union-attr]
    assert objects["optimizer"].state_dict()["state"] == {}
    assert objects["optimizer"].param_groups[0]["lr"] == 0.5
    assert loading.said() == PartlyRestored(
        skipped=("model.second.bias [3]", "model.second.weight [3, 4]"),
        missing=("model.second.bias [5]", "model.second.weight [5, 4]"),
        without_state=("optimizer",),
        absent=("extra",),
    )
    loading.tell(ID)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"autoglm: {ID}: partly restored"
    assert "  in the checkpoint, not loaded: model.second.weight [3, 4]" in told
    assert len(told) == 7


def test_a_model_that_fits_is_loaded_whole_though_it_need_not(
    trained: tuple[Net, restore.RestoredPart],
) -> None:
    _, restored = trained
    objects = objects_of(Net(first=4, second=3))
    assert not loaded(restored, objects, strict=False).partial
    assert objects["optimizer"].state_dict()["state"][0]["step"] == 1


def test_what_the_job_skips_is_as_the_script_makes_it(
    trained: tuple[Net, restore.RestoredPart],
) -> None:
    old, restored = trained
    objects = objects_of(Net(first=4, second=3), lr=0.25)
    loading = loaded(restored, objects, skip=("optimizer.settings",))
    assert torch.equal(objects["model"].first.weight, old.first.weight)  # type: ignore[arg-type]
    assert objects["optimizer"].state_dict()["state"][0]["step"] == 1
    assert objects["optimizer"].param_groups[0]["lr"] == 0.25
    assert [*loading.remarks()] == ["optimizer: goes on with the settings that the script gives it"]
    objects = objects_of(Net(first=4, second=3), lr=0.25)
    loading = loaded(restored, objects, skip=("optimizer",))
    assert objects["optimizer"].state_dict()["state"] == {}
    assert [*loading.remarks()] == [
        "optimizer: starts as the script makes it, not from the checkpoint"
    ]
    assert not loading.partial


def test_what_is_skipped_need_not_be_in_the_checkpoint(
    trained: tuple[Net, restore.RestoredPart],
) -> None:
    _, restored = trained
    objects = objects_of(Net(first=4, second=3))
    objects["scheduler"] = torch.optim.lr_scheduler.ConstantLR(objects["optimizer"])
    with pytest.raises(ObjectMismatch, match="also tracks scheduler"):
        loaded(restored, objects)
    assert loaded(restored, objects, skip=("scheduler",)).fresh == ("scheduler",)


def test_what_is_skipped_must_be_tracked(trained: tuple[Net, restore.RestoredPart]) -> None:
    _, restored = trained
    for name in ("schedular", "model.settings"):
        with pytest.raises(ObjectMismatch, match=f"are model, optimizer, found '{name}'"):
            loaded(restored, objects_of(Net(first=4, second=3)), skip=(name,))
