"""Hugging Face Trainer: one argument builds the groups of parameters and the attached optimizer.

python examples/trainer.py
torchrun --nproc-per-node 2 examples/trainer.py
"""

import tempfile

import tiny
import transformers

from growkit.integrations import huggingface


def main(steps=30, model=None, folder=None, resume=None, batch=tiny.BATCH, **options):
    settings = {"rho": 0.2, "betas": (0.7, 0.99), "every": 5}
    args = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    args |= {"max_steps": steps, "per_device_train_batch_size": batch, "train_sampling_strategy": "sequential"}
    args |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 5, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as temporary:
        trainer = transformers.Trainer(
            tiny.new_model() if model is None else model,
            transformers.TrainingArguments(folder or temporary, **args | options),
            train_dataset=tiny.windows(30 * tiny.BATCH),
            optimizer_cls_and_kwargs=(huggingface.Sophia, settings),
        )
        trainer.train(resume_from_checkpoint=resume)
    print(f"Trainer: loss {tiny.loss_of(trainer.model):.4f}, {trainer.state.log_history[-2]}")
    return trainer


if __name__ == "__main__":
    main()
