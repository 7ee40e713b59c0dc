"""What torchrun starts for test_examples.py: NAME.main() in float64 on each process, parameters to FOLDER/NAME.pt."""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

folder, *names = sys.argv[1:]
for name in names:
    result = importlib.import_module(name).main(batch=2)
    if torch.distributed.get_rank() == 0:
        model = result.model if name == "trainer" else result
        torch.save(model.state_dict(), f"{folder}/{name}.pt")
