"""What an installed wheel must do on a machine without a GPU: python -I smoke.py pure|cpu|cuda, out of a checkout."""

import sys
from pathlib import Path

import torch

import growkit
from growkit import ops, reference
from growkit.bench import pairs
from growkit.kron import expand, plan

kind = sys.argv[1]
here = Path(growkit.__file__).parent
assert "site-packages" in here.parts, f"growkit comes from {here}, not from the wheel"

# planner, reference, autograd
W, B, A, w = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8, 6), (12, 8), (4, 6), (5, 3)))
W_new = ops.kron_expand(W, B, A, w, A_kind="identity_top")
full = torch.cat([torch.eye(6), A])
torch.testing.assert_close(W_new, torch.einsum("ab,pi,bij,qj->apq", w, B, W, full))
W_new.sum().backward()
assert B.grad.isfinite().all()
assert plan.best_order(6, 12, plan.Axis("dense", 32, 48), plan.Axis("dense", 8, 12)) == "BAD"
assert pairs.count(pairs.PAIRS["gpt2-base-medium"]).identity_top == 195689447424

# schemas and fakes
assert "growkit::kron_mix_(Tensor(a" in str(torch.ops.growkit.kron_mix_.default._schema)
with torch._subclasses.FakeTensorMode():
    fake = ops.kron_expand(torch.empty(3, 8, 6), torch.empty(12, 8), torch.empty(4, 6), A_kind="identity_top")
assert fake.shape == (3, 12, 10)

# Sophia's update has the same bits whether it is compiled or not
lists = [[torch.full((n,), x) for n in (5, 40_000)] for x in (1.0, 1e-3, 2e-3, 1e-5)]
expected = [[t.clone() for t in x] for x in lists]
scalars = {"lr": 1e-3, "beta1": 0.9, "rho_bs": 256.0, "eps": 1e-15, "weight_decay": 0.1}
ops.sophia_step_(*lists, **scalars)
reference.sophia_step_(*expected, **scalars)
assert all(torch.equal(a, b) for a, b in zip(sum(lists, []), sum(expected, []), strict=True))

on = {
    key: torch._C._dispatch_has_kernel_for_dispatch_key(f"growkit::{op}", key)
    for op, key in (("sophia_step_", "CPU"), ("kron_mix_", "CUDA"))
}
if kind == "pure":
    assert expand._C is None and not any(on.values()), (expand.extension, on)
    assert not list(here.glob("_C*"))
else:
    from growkit import _C

    facts = _C.build_info()
    assert on == {"CPU": True, "CUDA": kind == "cuda"} and facts["kernels"] == on["CUDA"] and facts["torch_threads"]
    # Whether torch's stream function was found follows from the torch that is here, not from the one at the build.
    assert kind == "cpu" or facts["stream_found"] == (torch.version.cuda is not None), facts
    assert _C.mix_plan(12, 24, 768, 1024, [768 * 1024, 1024, 1], [1024, 1])["path"] == "vector"
print(f"growkit {growkit.__version__} beside torch {torch.__version__}: {kind}; {expand.extension}")
