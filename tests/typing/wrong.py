"""Calls that a type checker must report: each line that ends in `# wrong`, and no other. Checked, never run."""

from torch import nn

import growkit

model = nn.Linear(4, 4)
growkit.LiGO(model, {"n_layer": 4}, start="losless")  # wrong
growkit.LiGO(model, {"n_layer": 4}, sharing="all")  # wrong
growkit.LiGO(model, {"n_layer": 4}, seed="0")  # wrong
growkit.LiGO(model)  # wrong
operator = growkit.LiGO(model, {"n_layer": 4})
operator.fit([model], steps="20")  # wrong
operator.fit([model], optimizer="sgd")  # wrong
operator.fit([model], learning_rate=1e-3)  # wrong
growkit.SophiaX(model.parameters())  # wrong
growkit.SophiaG(model.parameters(), learning_rate=1e-3)  # wrong
