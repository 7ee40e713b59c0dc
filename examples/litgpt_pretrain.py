"""litgpt's pretraining with an optimizer by dotted name: python examples/litgpt_pretrain.py FOLDER"""

import sys

import litgpt.pretrain
import tiny
import torch
from litgpt.args import EvalArgs, TrainArgs

import growkit

SIZE = {"vocab_size": 256, "padded_vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 16}


class Text(litgpt.data.DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size = batch_size

    def train_dataloader(self):
        text = torch.cat([row["input_ids"] for row in tiny.windows(200)])
        return torch.utils.data.DataLoader(text.unfold(0, tiny.CONTEXT + 1, tiny.CONTEXT), self.batch_size)

    val_dataloader = train_dataloader


def main(folder, steps=30):
    data = {"max_tokens": steps * tiny.BATCH * tiny.CONTEXT, "max_seq_length": tiny.CONTEXT, "save_interval": None}
    rate = {"lr_warmup_steps": 0, "min_lr": 1e-3, "max_norm": 1.0}
    train = TrainArgs(global_batch_size=tiny.BATCH, micro_batch_size=tiny.BATCH, log_interval=10, **rate, **data)
    options = growkit.presets["short-run"] | {"every": 5}
    optimizer = {"class_path": "growkit.integrations.litgpt.SophiaG", "init_args": options}
    run = {"data": Text(), "train": train, "eval": EvalArgs(max_iters=1), "devices": 1, "logger_name": "csv"}
    sys.argv[1:] = ["pretrain", "tiny"]  # litgpt writes the command line beside the checkpoint
    config = litgpt.Config(**SIZE, block_size=tiny.CONTEXT)
    litgpt.pretrain.setup("tiny", config, folder, "32-true", optimizer=optimizer, **run)


if __name__ == "__main__":
    main(sys.argv[1])
