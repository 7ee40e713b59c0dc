"""The workload of sampled labels: likelihood and gradient against what torch has for it, checked in float64."""

import torch

from growkit import ops
from growkit.bench.measure import Case, Value, paired, temporaries
from growkit.bench.sophia import within


def refresh(device, tiny=False):
    """The loss of labels sampled from the model, and its gradient, against `Categorical` and `cross_entropy`.

    8,192 rows of GPT-2's vocabulary in bfloat16, as a refresh sees them.
    """
    count, vocabulary = (12, 41) if tiny else (8192, 50257)
    logits = torch.randn(count, vocabulary, device=device).mul_(3).to(torch.bfloat16).requires_grad_()
    key = {"refresh": 0}

    def run():
        key["refresh"] += 1
        logits.grad = None
        ops.sampled_nll(logits, seed=1, **key)[0].backward()

    def categorical():
        logits.grad = None
        labels = torch.distributions.Categorical(logits=logits.detach()).sample()
        torch.nn.functional.cross_entropy(logits, labels).backward()

    def rows(rounds):
        pairs = paired({"growkit": run, "Categorical": categorical}, "gpu", rounds)
        found = {"N1.time": pairs.ratio("Categorical", "growkit")}
        if torch.cuda.is_available():
            found["N1.memory"] = Value(temporaries(categorical) / temporaries(run))
        return found

    def check():
        """Likelihood and gradient are those of the labels drawn, in float64, and other keys draw other labels."""
        with torch.no_grad():
            logits.normal_(0, 3)
        drawn = []
        for refresh in (key["refresh"] + 1, key["refresh"] + 2):
            nll, labels, _ = ops.sampled_nll(logits, seed=1, refresh=refresh)
            drawn.append(labels)
        (grad,) = torch.autograd.grad(nll, logits)
        z = logits.detach().double()
        expected = torch.nn.functional.cross_entropy(z, labels)
        slope = (z.softmax(-1) - torch.nn.functional.one_hot(labels, vocabulary)) / count
        within("nll", nll.reshape(1), expected.reshape(1), 1e-5 * expected.reshape(1))
        within("gradient", grad, slope, 1e-6 / count + 2**-7 * slope.abs())
        if torch.equal(*drawn):
            raise AssertionError("two keys drew the same labels")

    # Logits read by the forward and by the backward, their gradient written.
    return Case(run, check, rows, bytes=3 * logits.nbytes)
