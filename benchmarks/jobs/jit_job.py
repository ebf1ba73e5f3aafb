"""A Trainer script that knows nothing of spotspeed, for benchmarks/jit_checkpoint.py.

python jit_job.py FOLDER TRAINING_ARGUMENT ...: each rank writes its process id to FOLDER/pid-RANK,
rank 0 every step that has ended to FOLDER/steps.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

PAUSE_S = 0.1


class Tokens(Dataset):
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Steps(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(PAUSE_S)
        if state.is_world_process_zero:
            with (self.folder / "steps").open("a") as file:
                file.write(f"{state.global_step}\n")


def main():
    # The deepspeed launcher puts its --local_rank before the folder.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder = Path(words[0])
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words[1:])
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Tokens())
    trainer.add_callback(Steps(folder))
    output = arguments.output_dir
    last = get_last_checkpoint(output) if os.path.isdir(output) else None
    trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    main()
