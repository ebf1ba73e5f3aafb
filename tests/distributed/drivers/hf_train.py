"""A Hugging Face Trainer script that knows nothing of spotspeed: `hf_train.py LOG ARGUMENT ...`.

Logs each step's loss and rate. After `--then` comes another LOG and its arguments, for a second
training in the same process.
"""

import json
import os
import sys

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 64, (16,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


class Logged(Trainer):
    def training_step(self, *args, **kwargs):
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss


class Log(TrainerCallback):
    def __init__(self, trainer, path):
        self.trainer, self.path = trainer, path

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.is_world_process_zero:
            record = {"step": state.global_step, "loss": self.trainer.last_loss.item(),
                      "epoch": state.epoch, "lr": lr_scheduler.get_last_lr()[0],
                      "history": len(state.log_history)}  # fmt: skip
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


def train(log, words):
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    set_seed(arguments.seed)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    trainer = Logged(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Tokens())
    trainer.add_callback(Log(trainer, log))
    output = arguments.output_dir
    last = get_last_checkpoint(output) if os.path.isdir(output) else None
    trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    words = sys.argv[1:]
    while "--then" in words:
        place = words.index("--then")
        train(words[0], words[1:place])
        words = words[place + 1 :]
    train(words[0], words[1:])
