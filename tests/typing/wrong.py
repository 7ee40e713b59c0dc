"""Calls that a type checker must report: each line that ends in `# wrong`, and no other. Checked, never run."""

import torch
from torch import nn

import growkit

model = nn.Linear(4, 4)
batches = [{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}]

growkit.SophiaX(model.parameters())  # wrong
growkit.SophiaG()  # wrong
growkit.SophiaG(model)  # wrong
growkit.SophiaG(model.parameters(), learning_rate=1e-3)  # wrong
growkit.SophiaG(model.parameters(), lr="1e-3")  # wrong
growkit.SophiaG(model.parameters(), betas=0.9)  # wrong
growkit.SophiaG(model.parameters(), rho="automatic")  # wrong
growkit.SophiaG(model.parameters(), weight_decay=None)  # wrong
growkit.SophiaG(model.parameters(), 1e-3, (0.9, 0.99), 0.04, 0.1, True)  # wrong
growkit.SophiaG(model.parameters(), fused="yes")  # wrong
growkit.SophiaH(model.parameters(), nesterov=None)  # wrong
growkit.SophiaG(model.parameters(), bf16_update="up")  # wrong
growkit.SophiaG(model.parameters(), state_dtype="16bit")  # wrong
growkit.SophiaH(model.parameters(), bs=480)  # wrong
growkit.SophiaH(model.parameters(), eps="1e-12")  # wrong
growkit.SophiaH(model.parameters(), hessian_power=1)  # wrong

growkit.param_groups(model.parameters(), 0.1)  # wrong
growkit.param_groups(model)  # wrong
growkit.param_groups(model, "0.1")  # wrong
growkit.param_groups(model, 0.1, no_decay=1)  # wrong
growkit.param_groups(model, 0.1, decay=())  # wrong

optimizer = growkit.SophiaG(model.parameters())
optimizer.attach(model.parameters())  # wrong
optimizer.attach(model, every="10")  # wrong
optimizer.attach(model, 10, "official")  # wrong
optimizer.attach(model, phase="offical")  # wrong
optimizer.attach(model, k=10)  # wrong
optimizer.attach(model, mask=True)  # wrong
optimizer.attach(model, loss=lambda output: output.loss)  # wrong
optimizer.refresh(model)  # wrong
optimizer.refresh(batches, model)  # wrong
optimizer.refresh(model, 10)  # wrong
optimizer.refresh(model, batches, likelihood=3)  # wrong
optimizer.refresh(model, batches, likelihood="gaussian")  # wrong
optimizer.refresh(model, batches, labels=batches)  # wrong
optimizer.step(bs="480")  # wrong
optimizer.metrics()["unclipped"].item()  # wrong
growkit.SophiaH(model.parameters()).refresh(model, batches, loss="mean")  # wrong

growkit.LiGO("gpt2", {"n_layer": 4})  # wrong
growkit.LiGO(model)  # wrong
growkit.LiGO(model, 4)  # wrong
growkit.LiGO(model, {"n_layer": 4}, start="losless")  # wrong
growkit.LiGO(model, {"n_layer": 4}, sharing="all")  # wrong
growkit.LiGO(model, {"n_layer": 4}, seed="0")  # wrong
growkit.LiGO(model, {"n_layer": 4}, weights=model)  # wrong
growkit.LiGO(model, {"n_layer": 4}, layers=4)  # wrong
operator = growkit.LiGO(model, {"n_layer": 4})
operator.fit(10, steps=20)  # wrong
operator.fit(batches, steps="20")  # wrong
operator.fit(batches, optimizer="sgd")  # wrong
operator.fit(batches, learning_rate=1e-3)  # wrong
operator.grow(dtype="float32")  # wrong
operator.check(4)  # wrong
