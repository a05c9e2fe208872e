"""Optimizers that go on from a checkpoint, though their parameters are not where they were."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autoglm_resume.checkpoint.format.ids import checkpoint_id
from autoglm_resume.checkpoint.state import capture, restore
from autoglm_resume.checkpoint.store.store import Store
from autoglm_resume.checkpoint.write.part_writer import PartWriter
from autoglm_resume.errors import ObjectMismatch
from autoglm_resume.protocol.assignment import Checkpointing
from autoglm_resume.worker.base.settings import Settings
from autoglm_resume.worker.state.fitting import Loading, fitted
from autoglm_resume.worker.state.parameters import ParameterWatch

ID = checkpoint_id(3, "a0")
LAYERS = ("first", "second", "third")


def net(*names: str) -> torch.nn.Module:
    """Layers of one shape, that names tell apart."""
    module = torch.nn.Module()
    for name in names or LAYERS:
        module.add_module(name, torch.nn.Linear(4, 4))
    return module


def structure_of(objects: dict[str, Any]) -> Any:
    modules = {n: o for n, o in objects.items() if isinstance(o, torch.nn.Module)}
    tensors = {f"{n}.{k}": v for n, o in modules.items() for k, v in o.state_dict().items()}
    return capture.structure_of(tensors) if modules else None


def step(objects: dict[str, Any]) -> None:
    """Gradients that differ from one parameter to the next."""
    for nth, (_, parameter) in enumerate(sorted(objects["model"].named_parameters())):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, nth + 1.0)
    for obj in objects.values():
        if isinstance(obj, torch.optim.Optimizer):
            obj.step()


def save(
    root: Path,
    objects: dict[str, Any],
    training: Callable[[dict[str, Any]], None] = step,
    *,
    older: bool = False,
) -> restore.RestoredPart:
    """After `training`; `older` versions knew nothing of parameters."""
    watch = ParameterWatch(objects)
    training(objects)
    snapshot = capture.take(
        {name: obj.state_dict() for name, obj in objects.items()},
        id=ID,
        rank=0,
        world_size=1,
        model=structure_of(objects),
        parameters=None if older else watch.parameters(),
    )
    store = Store(root)
    PartWriter(store).persist(snapshot)
    return restore.read(store, store.directory(ID), 0)


def load(restored: restore.RestoredPart, objects: dict[str, Any], **how: Any) -> Loading:
    checkpoint = Checkpointing("nowhere", **how)
    settings = Settings(0, 1, checkpoint, None, True, (), "a1", None)
    loading = fitted(ID, restored, objects, structure_of(objects), settings)
    loading.into(objects)
    return loading


def adam(model: torch.nn.Module, groups: Sequence[Sequence[str]], **more: Any) -> Any:
    """Over parameters by name."""
    named = dict(model.named_parameters())
    return torch.optim.AdamW(
        [{"params": [named[name] for name in group]} for group in groups], **more
    )


def moments(objects: dict[str, Any]) -> dict[str, float]:
    """A number that tells every parameter's moment, by name."""
    names = {id(p): name for name, p in objects["model"].named_parameters()}
    state = objects["optimizer"].state
    return {names[id(p)]: float(of["exp_avg"].flatten()[0]) for p, of in state.items()}


ORDER = ["first.weight", "first.bias", "second.weight", "second.bias"]


def test_parameters_in_another_order_get_their_own_moments(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": adam(model, [ORDER[:3], ORDER[3:]], lr=0.25)}
    restored = save(tmp_path, before)
    model = net("first", "second")
    after = {"model": model, "optimizer": adam(model, [ORDER[2::-1], ORDER[3:]])}
    (said,) = load(restored, after).remarks()
    assert moments(after) == moments(before)
    assert len(set(moments(after).values())) == 4
    assert said == "optimizer: its parameters are in another order now; told by their names"
    assert after["optimizer"].param_groups[1]["lr"] == 0.25
    assert not list(load(restored, before).remarks())


def test_a_model_that_makes_its_layers_in_another_order_gives_each_its_moments(
    tmp_path: Path,
) -> None:
    before: dict[str, Any] = {"model": net()}
    before["optimizer"] = torch.optim.AdamW(before["model"].named_parameters())
    restored = save(tmp_path, before)
    after: dict[str, Any] = {"model": net(*reversed(LAYERS))}
    after["optimizer"] = torch.optim.AdamW(after["model"].named_parameters())
    names = after["optimizer"].param_groups[0]["param_names"]
    load(restored, after)
    assert moments(after) == moments(before)
    assert after["optimizer"].param_groups[0]["param_names"] == names


def test_names_are_the_present_ones_where_the_job_renames(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": adam(model, [ORDER])}
    restored = save(tmp_path, before)
    model = net("begin", "second")
    named = dict(model.named_parameters())
    after = {"model": model, "optimizer": torch.optim.AdamW(reversed(list(named.values())))}
    load(restored, after, rename={"first": "begin"})
    found = moments(after)
    assert {n.replace("begin", "first"): v for n, v in found.items()} == moments(before)


def test_weights_that_are_tied_are_one_whatever_they_are_called_first(tmp_path: Path) -> None:
    def tied(*names: str) -> dict[str, Any]:
        model = net(*names)
        for name in names:
            getattr(model, name).weight = getattr(model, names[0]).weight
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    before, after = tied("a", "b", "c"), tied("c", "b", "a")
    restored = save(tmp_path, before)
    load(restored, after)
    parts = [o["optimizer"].state[o["model"].b.bias]["exp_avg"] for o in (before, after)]
    assert torch.equal(*parts)


def test_a_layer_that_is_left_out_is_refused_by_name(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.25)}
    restored = save(tmp_path, before)
    model = net("first", "second")
    after = {"model": model, "optimizer": torch.optim.AdamW(model.second.parameters())}  # type: ignore[union-attr]
    fresh = model.first.weight.detach().clone()  # type: ignore[operator,union-attr]
    with pytest.raises(ObjectMismatch) as caught:
        load(restored, after)
    assert (
        "group 0: expected 4 parameters, found 2; only in the checkpoint:" in caught.value.message
    )
    assert "model.first.bias" in caught.value.message
    assert "checkpoint.strict: false" in caught.value.hint
    assert torch.equal(model.first.weight, fresh)  # type: ignore[arg-type,union-attr]
    loading = load(restored, after, strict=False)
    assert loading.without_state == ("optimizer",)
    assert torch.equal(model.first.weight, before["model"].first.weight)  # type: ignore[arg-type,union-attr]
    assert not after["optimizer"].state
    assert after["optimizer"].param_groups[0]["lr"] == 0.25


def test_groups_that_changed_places_are_refused(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": adam(model, [ORDER[:2], ORDER[2:]])}
    restored = save(tmp_path, before)
    after = {"model": model, "optimizer": adam(model, [ORDER[2:], ORDER[:2]])}
    with pytest.raises(ObjectMismatch, match=r"group 0: .*; group 1: "):
        load(restored, after)


def test_two_optimizers_of_one_model_are_told_apart(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {
        "model": model,
        "one": torch.optim.AdamW(model.first.parameters()),  # type: ignore[union-attr]
        "both": torch.optim.SGD(model.parameters(), momentum=0.9),
    }
    restored = save(tmp_path, before)
    load(restored, before)
    after = {
        "model": model,
        "one": torch.optim.AdamW(model.second.parameters()),  # type: ignore[union-attr]
        "both": torch.optim.SGD(model.parameters(), momentum=0.9),
    }
    with pytest.raises(ObjectMismatch, match=r"step-0000000003.a0: one: group 0"):
        load(restored, after)


def test_parameters_of_no_tracked_module_are_told_by_their_shapes(tmp_path: Path) -> None:
    def alone(*shapes: tuple[int, ...]) -> dict[str, Any]:
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        for weight in weights:
            weight.grad = weight.detach() * weight.numel()
        return {"optimizer": torch.optim.AdamW(weights)}

    restored = save(tmp_path, alone((2,), (3,)), lambda objects: objects["optimizer"].step())
    after = alone((3,), (2,))
    load(restored, after)
    state = after["optimizer"].state
    assert all(of["exp_avg"].shape == weight.shape for weight, of in state.items())
    with pytest.raises(ObjectMismatch, match=r"one of shape \[2\] without a name"):
        load(restored, alone((3,), (4,)))


def test_older_checkpoints_tell_only_how_many_parameters_there_were(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    restored = save(tmp_path, before, older=True)
    load(restored, before)
    after = {"model": model, "optimizer": torch.optim.AdamW(model.second.parameters())}  # type: ignore[union-attr]
    with pytest.raises(
        ObjectMismatch, match=r"expected groups of \[4\] parameters, found .* \[2\]"
    ):
        load(restored, after)


def test_an_object_that_does_not_take_its_state_is_named(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            state["b"]

    restored = save(tmp_path, {"odd": Odd()}, lambda objects: None)
    with pytest.raises(ObjectMismatch, match=r"odd: Odd\.load_state_dict\(\) .* KeyError: 'b'"):
        load(restored, {"odd": Odd()})


def test_an_optimizer_may_have_a_state_of_its_own_form(tmp_path: Path) -> None:
    class Wrapped:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner
            self.param_groups = inner.param_groups

        def state_dict(self) -> dict[str, Any]:
            return {"inner": self.inner.state_dict(), "scale": 2.0}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.inner.load_state_dict(state["inner"])

    def made(*order: str) -> dict[str, Any]:
        model = net("first", "second")
        return {"model": model, "optimizer": Wrapped(adam(model, [order]))}

    restored = save(tmp_path, made(*ORDER), lambda objects: None)
    assert not list(load(restored, made(*ORDER)).remarks())
    with pytest.raises(ObjectMismatch, match=r"optimizer: Wrapped\.load_state_dict\(\)"):
        load(restored, made(*reversed(ORDER)))


# What training does to parameters


def unfreeze(objects: dict[str, Any]) -> None:
    step(objects)
    objects["model"].first.requires_grad_(True)
    objects["optimizer"].add_param_group(
        {"params": list(objects["model"].first.parameters()), "lr": 0.125}
    )
    step(objects)


def half_frozen() -> dict[str, Any]:
    model = net("first", "second")
    model.first.requires_grad_(False)  # type: ignore[union-attr]
    return {"model": model, "optimizer": torch.optim.AdamW(model.second.parameters())}  # type: ignore[union-attr]


def test_layers_that_training_has_unfrozen_go_on_being_trained(tmp_path: Path) -> None:
    before, after = half_frozen(), half_frozen()
    restored = save(tmp_path, before, unfreeze)
    said = list(load(restored, after).remarks())
    assert moments(after) == moments(before)
    assert len(moments(after)) == 4
    assert [group["lr"] for group in after["optimizer"].param_groups] == [1e-3, 0.125]
    assert all(parameter.requires_grad for parameter in after["model"].parameters())
    assert said == [
        "optimizer: given the group that training had given it: model.first.weight,"
        " model.first.bias",
        "unfrozen, as training had left them: model.first.bias, model.first.weight",
    ]


def test_a_group_of_named_parameters_is_given_with_its_names(tmp_path: Path) -> None:
    def made() -> dict[str, Any]:
        model = net("first", "second")
        return {
            "model": model,
            "optimizer": torch.optim.AdamW(model.second.named_parameters()),  # type: ignore[union-attr]
        }

    def grow(objects: dict[str, Any]) -> None:
        first = objects["model"].first.named_parameters()
        objects["optimizer"].add_param_group({"params": list(first)})
        step(objects)

    before, after = made(), made()
    load(save(tmp_path, before, grow), after)
    assert moments(after) == moments(before)
    names = [group["param_names"] for group in after["optimizer"].param_groups]
    assert names == [["weight", "bias"]] * 2


def test_a_script_that_has_all_groups_at_once_needs_none_given(tmp_path: Path) -> None:
    before, after = half_frozen(), half_frozen()
    restored = save(tmp_path, before, unfreeze)
    first = after["model"].first
    after["optimizer"].add_param_group({"params": list(first.requires_grad_(True).parameters())})
    assert not list(load(restored, after).remarks())
    assert moments(after) == moments(before)


def test_what_a_person_froze_in_the_script_stays_frozen(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    restored = save(tmp_path, before)
    model = net("first", "second")
    model.first.requires_grad_(False)  # type: ignore[union-attr]
    after = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    assert not list(load(restored, after).remarks())
    assert not model.first.weight.requires_grad  # type: ignore[union-attr]


def test_layers_that_training_has_frozen_stay_frozen(tmp_path: Path) -> None:
    model = net("first", "second")
    before = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    restored = save(tmp_path, before, lambda objects: objects["model"].first.requires_grad_(False))
    model = net("first", "second")
    after = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    (said,) = load(restored, after).remarks()
    assert said.startswith("frozen, as training had left them: model.first.bias")
    assert not model.first.weight.requires_grad  # type: ignore[union-attr]


def test_what_training_unfroze_is_too_late_in_distributed_data_parallel(tmp_path: Path) -> None:
    before, after = half_frozen(), half_frozen()
    restored = save(tmp_path, before, unfreeze)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(after["model"])
        with pytest.raises(ObjectMismatch, match=r"model\.first\.bias, .* DistributedDataParallel"):
            load(restored, after)
        del wrapped
    finally:
        dist.destroy_process_group()
    load(restored, after)
