"""One process: kinds of models and optimizers."""

from __future__ import annotations

import torch
from torch.nn import functional

from .registry import Program, program
from .usual import loss_of, net, usual


def images(optimizer: type[torch.optim.Optimizer], **settings: object) -> Program:
    """Convolutions whose weights lie in memory by channels."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 4),
    ).to(memory_format=torch.channels_last)
    chosen = optimizer(model.parameters(), lr=1e-2, fused=True, **settings)

    def step(_: int) -> float:
        x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        loss: torch.Tensor = model(x).square().mean()
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        return loss.item()

    return Program({"model": model, "optimizer": chosen}, step)


@program()
def channels_last_adamw() -> Program:
    """A fused optimizer walks through weights and moments in the order of memory."""
    return images(torch.optim.AdamW)


@program()
def channels_last_sgd() -> Program:
    """The same with momentum."""
    return images(torch.optim.SGD, momentum=0.9)


@program()
def compiled() -> Program:
    """A model that torch.compile wraps."""
    model = torch.compile(net(), backend="aot_eager")
    return usual(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


class Adapted(torch.nn.Module):
    """A frozen layer with a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(8, 1).requires_grad_(False)
        self.down = torch.nn.Linear(8, 2, bias=False)
        self.up = torch.nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(x) + self.up(self.down(x))
        return found


@program()
def lora() -> Program:
    """An optimizer of adapters only."""
    model = Adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    return usual(model, torch.optim.AdamW(trained, lr=1e-2))


class Tied(torch.nn.Module):
    """Words in and out by one table."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20, 8)
        self.out = torch.nn.Linear(8, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.words(x))
        return found


@program()
def tied_weights() -> Program:
    """One parameter under two names."""
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(_: int) -> float:
        x = torch.randint(0, 20, (12,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), x.roll(1))
        loss.backward()
        optimizer.step()
        return loss.item()

    return Program({"model": model, "optimizer": optimizer}, step)


@program()
def sparse() -> Program:
    """Sparse gradients, and a decay that goes round autograd after each step is done."""
    words = torch.nn.Embedding(5000, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(words.parameters(), lr=1e-2)

    def step(n: int) -> float:
        words.weight.data[n * 37 % 5000] *= 0.5
        optimizer.zero_grad()
        loss = words(torch.randint(0, 5000, (6,))).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Program({"model": words, "optimizer": optimizer}, step)


@program()
def in_backward() -> Program:
    """Each parameter is updated, and its gradient freed, within the backward pass."""
    model = net()
    own = {p: torch.optim.Adam([p], lr=1e-2) for p in model.parameters()}

    def update(parameter: torch.Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def step(_: int) -> float:
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    optimizers = {f"optimizer{n}": each for n, each in enumerate(own.values())}
    return Program({"model": model, **optimizers}, step)


@program()
def by_hand() -> Program:
    """No optimizer at all: updates through `.data` within the backward pass."""
    model = net()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: (p.data.sub_(p.grad, alpha=1e-2), setattr(p, "grad", None))[1]
        )

    def step(_: int) -> float:
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    return Program({"model": model}, step)


@program(needs=("schedulefree",))
def schedule_free() -> Program:
    """An optimizer that keeps other weights for training than for evaluation."""
    import schedulefree

    model = net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=5)
    found = usual(model, optimizer)
    inner = found.step

    def step(n: int) -> object:
        if n % 7 == 6:
            optimizer.eval()
            model.eval()(torch.ones(1, 8))
            model.train()
        optimizer.train()
        return inner(n)

    found.step = step
    return found


@program()
def lbfgs() -> Program:
    """An optimizer that calls the model itself, and remembers lists of tensors."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def step(_: int) -> float:
        x = torch.randn(6, 8)

        def closure() -> float:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss.item()

        return float(optimizer.step(closure))  # type: ignore[arg-type]

    return Program({"model": model, "optimizer": optimizer}, step)


@program()
def muon() -> Program:
    """Matrices by one optimizer, the rest by another."""
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    first = torch.optim.Muon(matrices, lr=1e-2)
    second = torch.optim.AdamW(others, lr=1e-2)

    def step(_: int) -> float:
        first.zero_grad()
        second.zero_grad()
        loss = loss_of(model)
        loss.backward()
        first.step()
        second.step()
        return loss.item()

    return Program({"model": model, "matrices": first, "others": second}, step)


@program()
def complex_numbers() -> Program:
    """Complex parameters, one of them conjugated lazily."""
    weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    model = torch.nn.ParameterDict({"weight": weight})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def step(_: int) -> float:
        optimizer.zero_grad()
        x = torch.randn(4, 4, dtype=torch.complex64).conj()
        loss = (model["weight"] @ x).abs().square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Program({"model": model, "optimizer": optimizer}, step)


@program()
def fp8() -> Program:
    """Weights of one byte, with scales and a generator of their own."""
    master = torch.nn.Linear(8, 8)
    model = torch.nn.Module()
    model.register_buffer("weight", master.weight.detach().to(torch.float8_e4m3fn))
    model.register_buffer("scale", torch.ones(8, 1))
    noise = torch.Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-2)

    def step(_: int) -> float:
        optimizer.zero_grad()
        loss = (master(torch.randn(6, 8)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        rounded = master.weight + 1e-3 * torch.randn(8, 8, generator=noise)
        model.scale = rounded.detach().abs().amax(1, keepdim=True)
        model.weight = (rounded / model.scale).detach().to(torch.float8_e4m3fn)
        return loss.item()

    class Noise:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"state": noise.get_state()}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            noise.set_state(state["state"])

    track = {"master": master, "model": model, "optimizer": optimizer, "noise": Noise()}
    return Program(track, step)


@program()
def groups_from_sets() -> Program:
    """Groups of parameters made from sets, whose order differs from process to process."""
    model = net()
    decayed = {p for p in model.parameters() if p.ndim > 1}
    others = set(model.parameters()) - decayed
    groups = [{"params": list(decayed), "weight_decay": 0.1}, {"params": list(others)}]
    return usual(model, torch.optim.AdamW(groups, lr=1e-2, foreach=False))
