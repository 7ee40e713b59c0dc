"""TRL's SFTTrainer takes what Trainer takes: python examples/sft.py"""

import tempfile

import datasets
import tiny
import tokenizers
import transformers
import trl

from growkit.integrations import huggingface


def byte_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", *map(chr, range(1, 256))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<pad>")


def main(steps=30):
    settings = {"rho": 0.2, "betas": (0.7, 0.99), "every": 5}
    args = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    args |= {"max_steps": steps, "per_device_train_batch_size": tiny.BATCH, "train_sampling_strategy": "sequential"}
    args |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 10, "save_strategy": "no"}
    rows = [{"input_ids": row["input_ids"].tolist()} for row in tiny.windows(steps * tiny.BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            tiny.new_model(),
            trl.SFTConfig(folder, bf16=False, max_length=tiny.CONTEXT, gradient_checkpointing=False, **args),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=byte_tokenizer(),
            optimizer_cls_and_kwargs=(huggingface.Sophia, settings),
        )
        trainer.train()
    print(f"SFTTrainer: loss {tiny.loss_of(trainer.model):.4f}, {trainer.state.log_history[-2]}")
    return trainer


if __name__ == "__main__":
    main()
