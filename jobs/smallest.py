"""The smallest training that survives: kill it at any moment, and it ends with the same weights."""

import time

import torch

import autoglm_resume as autoglm

torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

session = autoglm.init()
session.track(model=model, optimizer=optimizer)

for step in session.steps(200):
    x = torch.randn(32, 8)
    loss = (model(x) - x.sum(dim=1, keepdim=True) + torch.randn(32, 1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    session.report(loss=loss)
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.6f}", flush=True)
    time.sleep(0.05)  # so that there is time to kill it

print("weights", model.weight.tolist(), model.bias.tolist())
