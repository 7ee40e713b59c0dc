"""Pretrain a causal language model of transformers on a text file; on one process, or on many with FSDP2.

    python examples/pretrain.py text.txt config.json run
    torchrun --nproc-per-node 8 examples/pretrain.py text.txt grown-checkpoint/ run --tokenizer folder --lr 3e-4

A stopped run goes on from its last checkpoint, to the bit: batches and dropout are drawn by (seed, step).
"""

import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import growkit


def pretrain(
    data: Path, model: Path, out: Path, tokenizer: str = "", adamw: bool = False, lr: float = 6e-4, rho: float = 0.05,
    beta1: float = 0.9, steps: int = 1000, batch: int = 16, context: int = 128, every: int = 10, save_every: int = 200,
    seed: int = 0, bf16: bool = False, nesterov: bool = False,
):  # fmt: skip
    """Train MODEL, a config.json or a checkpoint's folder, on DATA but its last tenth, which validates.

    A step takes `batch` windows of `context` tokens (without --tokenizer, bytes) on all processes; --bf16: autocast.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(*("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else ("cpu",))
    tokens = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.uint8).long()
    if tokenizer:
        tokens = torch.tensor(AutoTokenizer.from_pretrained(tokenizer)(data.read_bytes().decode()).input_ids)
    train, held_out = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    torch.manual_seed(seed)
    weights = model.is_dir() and AutoModelForCausalLM.from_pretrained(model)
    net = (weights or AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))).to(device)
    if world > 1:
        dist.init_process_group()
        for module in [m for m in net.modules() if type(m).__name__ in net._no_split_modules] + [net]:
            fully_shard(module)
    groups, betas = growkit.param_groups(net, 0.1), (beta1, 0.95 if adamw else 0.99)
    sophia = {"rho": rho, "nesterov": nesterov}
    optimizer = torch.optim.AdamW(groups, betas=betas) if adamw else growkit.SophiaG(groups, betas=betas, **sophia)
    if not adamw:
        optimizer.attach(net, every=every)

    def loss_of(tokens, starts):
        rows = torch.stack([tokens[i : i + context] for i in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return net(input_ids=rows, labels=rows).loss

    done = max((int(folder.name[5:]) for folder in out.glob("step-*[0-9]")), default=0)
    if done:
        state = states.get_state_dict(net, optimizer)
        dcp.load({"model": state[0], "optimizer": state[1]}, checkpoint_id=out / f"step-{done}", no_dist=world == 1)
        states.set_state_dict(net, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
    began = time.perf_counter()
    for step in range(done, steps):
        for group in optimizer.param_groups:  # up, constant, and a line down to 0
            group["lr"] = lr * min(1, (step + 1) / max(1, 0.05 * steps), (steps - step) / (0.4 * steps))
        torch.manual_seed((seed << 32) + step)
        starts = torch.randint(len(train) - context + 1, (batch,))
        torch.manual_seed((seed << 32) + step * world + rank)  # of dropout
        (loss := loss_of(train, starts.chunk(world)[rank])).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            loss.item()  # waits for the device
            pace = (step + 1 - done) * batch * context / (time.perf_counter() - began)
            net.eval()
            with torch.no_grad():
                parts = torch.arange(0, len(held_out) - context + 1, context).split(batch)
                nats = sum(float(loss_of(held_out, part)) * len(part) for part in parts) / sum(map(len, parts))
            net.train()
            state = states.get_state_dict(net, optimizer)
            part = out / f"step-{step + 1}.part"
            dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=part, no_dist=world == 1)
            if rank == 0:
                part.rename(part.with_suffix(""))  # a checkpoint that a reader sees is complete
                shutil.rmtree(out / f"step-{done}", ignore_errors=True)
                told = f"validation {nats / math.log(2):.4f} bits a token  {pace:,.0f} tokens/s"
                print(f"step {step + 1:6}  {told}", "" if adamw else optimizer.metrics(), flush=True)
            done, began = step + 1, time.perf_counter()
    state = states.get_model_state_dict(net, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        net.save_pretrained(out / "model", state_dict=state)  # from_pretrained and growkit grow read it
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(pretrain)
