"""Trains on torchdata's StatefulDataLoader from where it was: `stateful_loader.py PATH STOP_AT`."""

import json
import sys

import deepspeed
import torch
from engines import RANK, make
from torchdata.stateful_dataloader import StatefulDataLoader

import spotspeed

PATH, STOP_AT = sys.argv[1], int(sys.argv[2])
SAMPLES, PER_STEP = 24, 4


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return index


def main():
    deepspeed.init_distributed("gloo")
    engine = make(2, PATH, attached=False, train_batch_size=PER_STEP)
    sampler = torch.utils.data.DistributedSampler(Numbers(), seed=7)
    loader = StatefulDataLoader(Numbers(), batch_size=1, sampler=sampler, num_workers=1)
    checkpointer = spotspeed.attach(engine, state={"data": loader})
    checkpointer.restore()
    for batch in loader:
        loss = engine(torch.full((1, 8), float(batch))).pow(2).mean()
        engine.backward(loss)
        engine.step()
        print(f"saw: {json.dumps([RANK, int(batch)])}", flush=True)
        if engine.global_steps == STOP_AT:
            break
    checkpointer.close()


main()
