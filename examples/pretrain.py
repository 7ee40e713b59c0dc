"""Pretrain a causal language model on a text file: on one process, or on many under torchrun with FSDP2.

    python examples/pretrain.py text.txt config.json run
    torchrun --nproc-per-node 8 examples/pretrain.py text.txt config.json run --tokenizer folder --lr 3e-4

A run that was stopped goes on where its last checkpoint was, to the bit, also on another number of processes: batches
and dropout are drawn by (seed, step), and everything that the optimizer needs lies in its checkpoint.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import growkit

OPTIMIZERS = {
    "adamw": lambda groups, beta1, rho: torch.optim.AdamW(groups, betas=(beta1, 0.95)),
    "nadamw": lambda groups, beta1, rho: torch.optim.NAdam(groups, betas=(beta1, 0.95), decoupled_weight_decay=True),
    "sophiag": lambda groups, beta1, rho: growkit.SophiaG(groups, betas=(beta1, 0.99), rho=rho),
    "sophiah": lambda groups, beta1, rho: growkit.SophiaH(groups, betas=(beta1, 0.99), rho=rho),
}


def read_tokens(data: Path, tokenizer: str) -> torch.Tensor:
    """The whole text as token ids: of a tokenizer, or its bytes."""
    if tokenizer:
        return torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(data.read_text()).input_ids)
    return torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.uint8).long()


def windows(tokens: torch.Tensor, starts, context: int, device) -> dict[str, torch.Tensor]:
    """The batch of those windows, for a causal model: [len(starts), context] ids, which are their own labels."""
    rows = torch.stack([tokens[i : i + context] for i in starts]).to(device)
    return {"input_ids": rows, "labels": rows}


@torch.no_grad()
def validation_loss(model, tokens, context, batch, device) -> float:
    """Mean loss in nats per token over all whole windows; every process reads all of them."""
    model.eval()
    starts = list(range(0, len(tokens) - context + 1, context))
    total = 0.0
    for i in range(0, len(starts), batch):
        part = starts[i : i + batch]
        total += float(model(**windows(tokens, part, context, device)).loss) * len(part)
    model.train()
    return total / len(starts)


def pretrain(
    data: Path,
    config: Path,
    out: Path,
    tokenizer: str = "",
    optimizer: str = "sophiag",
    lr: float = 6e-4,
    beta1: float = 0.965,
    rho: float = 0.05,
    weight_decay: float = 0.2,
    steps: int = 1000,
    warmup: int = 50,
    decay: float = 0.4,
    batch: int = 16,
    context: int = 128,
    every: int = 10,
    save_every: int = 200,
    seed: int = 0,
) -> float:
    """Train `config` on the first nine tenths of `data`; returns the loss on the rest, in nats per token.

    lr rises over `warmup` steps, stays, and falls to 0 over the last `decay` share of `steps`. batch: windows of
    `context` tokens a step, of all processes together. every: steps between curvature refreshes. out: folder for the
    checkpoints, for log.jsonl and, at the end, for the model.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if batch % world:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {world} processes")
    tokens = read_tokens(data, tokenizer)
    train, held_out = tokens.split([len(tokens) * 9 // 10, len(tokens) - len(tokens) * 9 // 10])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).to(device)
    if world > 1:
        dist.init_process_group()
        for module in model.modules():
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module)
        fully_shard(model)
    opt = OPTIMIZERS[optimizer](growkit.param_groups(model, weight_decay), beta1, rho)
    if hasattr(opt, "attach"):
        opt.attach(model, every=every)

    out.mkdir(parents=True, exist_ok=True)
    saved = sorted((int(path.name[5:]) for path in out.glob("step-*") if not path.suffix), reverse=True)
    if saved:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.load(state, checkpoint_id=out / f"step-{saved[0]}", no_dist=world == 1)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    started = time.perf_counter()
    for step in range(saved[0] if saved else 0, steps):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup, (steps - step) / max(1, decay * steps))
        draw = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(len(train) - context + 1, (batch,), generator=draw).chunk(world)[rank].tolist()
        torch.manual_seed((seed << 32) + step * world + rank)  # of dropout
        loss = model(**windows(train, starts, context, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            line = {"step": step + 1, "loss": float(loss.detach()), "seconds": time.perf_counter() - started}
            line["validation"] = validation_loss(model, held_out, context, batch, device)
            line["stats"] = opt.stats() if hasattr(opt, "stats") else {}
            state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
            dcp.save(state, checkpoint_id=out / f"step-{step + 1}.part", no_dist=world == 1)
            if rank == 0:
                (out / f"step-{step + 1}.part").rename(out / f"step-{step + 1}")
                for old in saved:
                    shutil.rmtree(out / f"step-{old}", ignore_errors=True)
                with (out / "log.jsonl").open("a") as log:
                    print(json.dumps(line), file=log)
                bits = line["validation"] / math.log(2)
                print(f"step {step + 1:6}  validation {bits:.4f} bits/token  {line['seconds']:.0f} s", flush=True)
            saved = [step + 1]
    if world > 1:
        dist.destroy_process_group()
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["validation"]


if __name__ == "__main__":
    typer.run(pretrain)
