"""The examples run, and each framework's loop gives the parameters of the plain loop.

In float64, so that what is left of a difference is a difference in kind: another batch, factor, schedule or label.
"""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import growkit

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOPS = ["sophia_loop", "trainer", "accelerate_loop", "lightning_loop", "torchtitan_loop", "litgpt_pretrain", "sft"]

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
    torch.set_default_dtype(torch.float32)


def example(name, needs="transformers"):
    """The example of that name; skipped without the framework, unless all of them are to be there."""
    if not os.environ.get("GROWKIT_ALL_INTEGRATIONS"):
        pytest.importorskip(needs)
    return importlib.import_module(name)


def assert_same_parameters(found, expected, bound=1e-10):
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        difference = (p - q).detach().abs().max().item()
        assert difference <= bound, f"{name} differs by {difference}"


@pytest.fixture(scope="module")
def plain_model():
    sys.path.insert(0, str(EXAMPLES))
    torch.set_default_dtype(torch.float64)
    model = importlib.import_module("sophia_loop").main()
    torch.set_default_dtype(torch.float32)
    sys.path.remove(str(EXAMPLES))
    return model


def micro_batch_loop(micro, accumulate, steps, mask=None, items=False, dtype=None):
    """The plain loop over micro-batches: the mean over all labels of a step that count; refreshed on the last one.

    items: let transformers divide by all labels of the step, which in float32, its loss's dtype, rounds otherwise.
    """
    tiny = example("tiny")
    model = tiny.new_model()
    optimizer = growkit.SophiaG(growkit.param_groups(model, 0.1), **growkit.presets["short-run"])
    optimizer.attach(model, every=5)
    rows = tiny.windows(steps * micro * accumulate)
    parts = list(torch.utils.data.DataLoader(mask(rows) if mask else rows, batch_size=micro))
    for first in range(0, len(parts), accumulate):
        step = parts[first : first + accumulate]
        counts = [(part["labels"][:, 1:] != -100).sum() for part in step]
        for part, count in zip(step, counts, strict=True):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                if items:
                    loss = model(**part, num_items_in_batch=sum(counts)).loss
                else:
                    loss = model(**part).loss * (count / sum(counts))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("name", "lines"),
    [*((name, 40) for name in LOOPS), ("fsdp2", 60), ("pretrain", 100)],  # the last holds a whole job: it resumes, too
)
def test_an_example_is_short(name, lines):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= lines


# --- Trainer ---


def test_trainer_is_the_plain_loop_and_logs_metrics():
    trainer = example("trainer", "accelerate").main()
    assert_same_parameters(trainer.model, micro_batch_loop(4, 1, 30, items=True))
    groups = trainer.optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0)]  # of TrainingArguments
    told = [log for log in trainer.state.log_history if "loss" in log]
    assert len(told) == 6 and all(0 <= log["sophia/unclipped"] <= 1 for log in told[1:])
    assert told[-1]["sophia/refreshes"] == 6 and not any("sophia" in key for key in trainer.state.log_history[-1])


def test_trainer_accumulates_as_the_plain_loop_with_uneven_labels():
    """num_items_in_batch: the loss of a micro-batch is divided by the labels of all of them."""
    tiny, module = example("tiny"), example("trainer", "accelerate")
    whole = tiny.windows

    def masked(rows):
        return [
            {"input_ids": row["input_ids"], "labels": row["labels"].masked_fill(torch.arange(32) < 3 * (i % 7), -100)}
            for i, row in enumerate(rows)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "windows", lambda count: masked(whole(count)))
        trainer = module.main(steps=8, batch=2, gradient_accumulation_steps=2)
    assert_same_parameters(trainer.model, micro_batch_loop(2, 2, 8, masked, items=True))


def test_trainer_resumes_bit_for_bit(tmp_path):
    module = example("trainer", "accelerate")
    options = {"folder": str(tmp_path), "save_strategy": "steps", "save_steps": 8}
    whole = module.main(steps=16, **options)
    resumed = module.main(steps=16, resume=str(tmp_path / "checkpoint-8"), **options)
    assert_same_parameters(resumed.model, whole.model, bound=0)


def test_trainer_compiles():
    trainer = example("trainer", "accelerate").main(steps=7, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_parameters(trainer.model, micro_batch_loop(4, 1, 7, items=True))


def test_trainer_in_bfloat16():
    torch.set_default_dtype(torch.float32)
    trainer = example("trainer").main(steps=10, bf16=True)
    assert_same_parameters(trainer.model, micro_batch_loop(4, 1, 10, items=True, dtype=torch.bfloat16), bound=0)
    assert trainer.optimizer.optimizer.metrics()["refreshes"] == 2


def test_a_forgotten_attach_is_told_at_the_first_step_at_the_line_that_calls_train(tmp_path):
    transformers, tiny = example("transformers", "accelerate"), example("tiny")
    args = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = transformers.Trainer(
        tiny.new_model(),
        transformers.TrainingArguments(str(tmp_path), **args),
        train_dataset=tiny.windows(8),
        optimizer_cls_and_kwargs=(growkit.SophiaG, {"lr": 1e-3}),
    )
    with pytest.warns(UserWarning, match="in a Trainer but attached to no model") as caught:
        trainer.train()
    (told,) = [each for each in caught if "attached to no model" in str(each.message)]
    assert told.filename == __file__


def test_sophia_outside_of_a_trainer_asks_for_lr():
    huggingface = example("growkit.integrations.huggingface", "accelerate")
    with pytest.raises(ValueError, match="lr and weight_decay are missing"):
        huggingface.Sophia()(torch.nn.Linear(2, 2), rho=0.1)
    optimizer = huggingface.Sophia()(torch.nn.Linear(2, 2), lr=0.5, weight_decay=0.1, optimizer=growkit.SophiaH)
    assert isinstance(optimizer, growkit.SophiaH) and optimizer.param_groups[0]["every"] == 10


# --- two processes ---


@pytest.fixture(scope="module")
def parameters_of_two_processes(tmp_path_factory):
    """{example: parameters}, of one start of torchrun."""
    example("accelerate", "accelerate")
    folder, names = tmp_path_factory.mktemp("two"), ["fsdp2", "trainer", "accelerate_loop"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [Path(__file__).with_name("two_processes.py"), folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: torch.load(folder / f"{name}.pt") for name in names}


@pytest.mark.parametrize("name", ["fsdp2", "trainer", "accelerate_loop"])
def test_two_processes_are_one_with_their_batches_together(name, parameters_of_two_processes):
    model = example("tiny").new_model()
    model.load_state_dict(parameters_of_two_processes[name])
    assert_same_parameters(model, micro_batch_loop(4, 1, 30, items=name == "trainer"), bound=1e-9)


# --- Accelerate, Lightning ---


def test_accelerate_is_the_plain_loop(plain_model):
    module = example("accelerate_loop", "accelerate")
    assert_same_parameters(module.main(), plain_model)
    assert_same_parameters(module.main(steps=8, accumulate=2, batch=2), micro_batch_loop(2, 2, 8))


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_lightning_is_the_plain_loop_and_logs_metrics(plain_model, automatic, tmp_path):
    module = example("lightning_loop", "lightning")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trainer = module.main(automatic=automatic, logger=logger)
    assert_same_parameters(trainer.lightning_module.model, plain_model)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "sophia/unclipped" in header and "sophia/h_q50" in header


# --- TRL, litgpt, torchtitan ---


def test_sft_is_the_plain_loop_though_its_training_calls_return_no_logits():
    trainer = example("sft", "trl").main(steps=12)
    assert_same_parameters(trainer.model, micro_batch_loop(4, 1, 12), bound=1e-5)  # its loss is formed in float32
    assert trainer.state.log_history[0]["sophia/refreshes"] == 2


def test_torchtitan_is_the_plain_loop(plain_model):
    module = example("torchtitan_loop", "torchtitan")
    assert_same_parameters(module.main(), plain_model)
    container = module.SophiaContainer
    with pytest.raises(ValueError, match="the model is in 2 parts, expected 1"):
        container(container.Config(param_groups=[]), model_parts=[torch.nn.Linear(2, 2)] * 2)


def test_litgpt_is_the_plain_loop(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)  # litgpt sets it itself
    module = example("litgpt_pretrain", "litgpt")
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # litgpt compiles the model, which takes a minute
    monkeypatch.setattr(sys, "argv", ["litgpt"])
    module.main(tmp_path)
    found = torch.load(tmp_path / "final" / "lit_model.pth", weights_only=False)["model"]

    import lightning
    from litgpt import pretrain

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(42)
    with fabric.init_module(empty_init=True):
        model = pretrain.GPT(pretrain.Config(**module.SIZE, block_size=32))
    pretrain.initialize_weights(fabric, model, n_layer=1, n_embd=16)
    optimizer = growkit.SophiaG(model.parameters(), **growkit.presets["short-run"])
    optimizer.attach(model, every=5)
    data = module.Text()
    data.connect(batch_size=4)
    for batch in list(data.train_dataloader())[:30]:
        logits = model(batch[:, :-1].contiguous())
        pretrain.chunked_cross_entropy(logits, batch[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = pretrain.GPT(pretrain.Config(**module.SIZE, block_size=32))
    expected.load_state_dict(found)
    assert_same_parameters(expected, model, bound=1e-6)


def test_litgpts_sophia_needs_the_parameters_of_a_model():
    litgpt = importlib.import_module("growkit.integrations.litgpt")
    with pytest.raises(TypeError, match=r"params is list, expected model.parameters\(\)"):
        litgpt.SophiaG(list(torch.nn.Linear(2, 2).parameters()))
    model = torch.nn.Linear(2, 2)
    assert litgpt.SophiaG(model.parameters(), every=3).param_groups[0]["every"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_trainer_on_a_gpu(options):
    torch.set_default_dtype(torch.float32)
    trainer = example("trainer").main(use_cpu=False, **options)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert next(trainer.model.parameters()).is_cuda and losses[-1] < losses[0] - 0.3
    assert trainer.optimizer.optimizer.stats()["refreshes"] == 6
