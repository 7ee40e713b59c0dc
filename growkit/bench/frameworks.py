"""The loops of frameworks on the task of growkit.bench.loops: those that are installed here.

Each is handed the micro-batches as a dataset of one micro-batch a row, those of all processes in turn.
"""

import importlib.metadata
import importlib.util
import os
import tempfile

import torch

from growkit.bench import loops
from growkit.bench.loops import EVERY, MICRO, SETTINGS, STEPS, Loop, result
from growkit.optim import SophiaG, SophiaH

LOOPS: list[Loop] = []


def framework(needs, name, processes=(1, 2), note=""):
    """Register a loop, as `loops.loop` does, if the module `needs` is installed."""

    def add(run):
        if importlib.util.find_spec(needs):
            LOOPS.append(Loop(name, processes, (SophiaG, SophiaH), run, note))
        return run

    return add


def versions():
    """Of the frameworks that are installed, in words."""
    names = ("transformers", "accelerate", "trl", "lightning", "torchtitan", "litgpt")
    found = [name for name in names if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found) or "no framework"


class Model(loops.Model):
    """As frameworks expect it: a dict out, and keywords that it does not know."""

    def forward(self, tokens, labels=None, weight=1.0, **_):
        output = super().forward(tokens, labels, weight)
        return {"loss": output.loss, "logits": output.logits}


def new_model():
    torch.manual_seed(0)
    return Model().double()


def rows(world):
    """The micro-batches of all steps: row i is for process i % world."""
    return [
        batch
        for step in range(STEPS)
        for parts in zip(*(loops.batches(step, rank, world) for rank in range(world)), strict=True)
        for batch in parts
    ]


def first(batch):
    return batch[0]


def loader(world):
    return torch.utils.data.DataLoader(rows(world), batch_size=1, collate_fn=first)


def launched(rank):
    """What torchrun would have set besides."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def attached(cls, model):
    optimizer = cls(model.parameters(), **SETTINGS[cls])
    optimizer.attach(model, every=EVERY)
    return optimizer


@framework("transformers", "Hugging Face Trainer", note="in one argument: examples/trainer.py; TRL: examples/sft.py")
def trainer(rank, world, cls):
    import transformers

    launched(rank)
    model = new_model()
    optimizer = attached(cls, model)
    options = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": STEPS,
    }
    options |= {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "remove_unused_columns": False}
    options |= {"max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": MICRO}
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, average_tokens_across_devices=False, **options)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        transformers.Trainer(model, args, first, rows(world), optimizers=(optimizer, constant)).train()
    return result(model, optimizer)


@framework("accelerate", "Accelerate", note="attach before or after prepare(): examples/accelerate_loop.py")
def accelerate(rank, world, cls):
    import accelerate

    launched(rank)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    inner = new_model()
    optimizer = attached(cls, inner)
    model, wrapped, data = accelerator.prepare(inner, optimizer, loader(world))
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"] * MICRO)
            wrapped.step()
            wrapped.zero_grad()
    return result(inner, optimizer)


def lightning_loop(cls, automatic):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.automatic_optimization = new_model(), automatic

        def configure_optimizers(self):
            self.optimizer = attached(cls, self.model)
            return self.optimizer

        def training_step(self, batch, index):
            loss = self.model(**batch)["loss"]
            if automatic:
                return loss * MICRO
            self.manual_backward(loss)
            if index % MICRO == MICRO - 1:
                self.optimizers().step()
                self.optimizers().zero_grad()

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 1}
    options |= {"enable_model_summary": False, "accumulate_grad_batches": MICRO if automatic else 1}
    run = lightning.Trainer(accelerator="cpu", strategy="auto", max_epochs=1, **options)
    run.fit(module := Module(), loader(1))
    return result(module.model, module.optimizer)


@framework("lightning", "Lightning, automatic optimization", (1,), note="examples/lightning_loop.py")
def lightning_automatic(rank, world, cls):
    return lightning_loop(cls, automatic=True)


@framework("lightning", "Lightning, manual optimization", (1,))
def lightning_manual(rank, world, cls):
    return lightning_loop(cls, automatic=False)


@framework("torchtitan", "torchtitan's container of optimizers", (1,), note="examples/torchtitan_loop.py")
def torchtitan(rank, world, cls):
    from torchtitan.components.optimizer import ParamGroupConfig

    from growkit.integrations.torchtitan import SophiaContainer

    group = ParamGroupConfig(pattern=".*", optimizer_name=cls.__name__, optimizer_kwargs=SETTINGS[cls])
    options = {"implementation": "for-loop", "every": EVERY, "param_groups": [group]}
    model = new_model()
    optimizers = SophiaContainer(SophiaContainer.Config(**options), model_parts=[model])
    for i, batch in enumerate(rows(1)):
        model(**batch)["loss"].backward()
        if i % MICRO == MICRO - 1:
            optimizers.step()
            optimizers.zero_grad()
    return result(model, optimizers.optimizers[0])
