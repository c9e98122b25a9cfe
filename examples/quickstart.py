"""Swaps the modules of a small model, trains it for five steps and prints the report.

It needs only torch and torch_nnmath:

    python examples/quickstart.py
"""

import torch

import torch_nnmath

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 50_000))
report = torch_nnmath.swap(model)

x, y = torch.randn(256, 64), torch.randint(50_000, (256,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(5):
    loss = torch.nn.functional.cross_entropy(model(x), y)  # the logits are not materialised
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.3f}")
print(report)
