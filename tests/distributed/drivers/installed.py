"""Engines of a script that knows nothing of spotspeed: `first`, then `again` in a spawned child."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from functools import partial
from pathlib import Path

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])


def three_lines(expected):
    """A script of the README's under `spotspeed.run`: attached and restored once, not twice."""
    import torch
    from engines import make, raises, train

    import spotspeed
    from spotspeed.errors import ConfigError

    class Sampler:
        seen = 0

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    engine, state = make(1, FOLDER / "three", attached=False), Sampler()
    loader = torch.utils.data.DataLoader(list(range(8)))
    checkpointer = spotspeed.attach(engine, loader=loader, state={"sampler": state})
    assert spotspeed.attach(engine) is checkpointer and checkpointer.loader is loader
    raises(ConfigError, lambda: spotspeed.attach(engine, loader=list(loader)))
    restored = checkpointer.restore()
    found = (0, 0) if restored is None else (restored.step, state.seen)
    assert found == expected, found
    for _ in range(2):
        train(engine, 1)
        state.seen += 10
    raises(ConfigError, checkpointer.restore)
    checkpointer.close()
    engine.destroy()


def script(steps):
    """Two models with one config, and one with an optimizer that spotspeed does not know."""
    import torch
    from engines import make, train

    class Odd(torch.optim.SGD):
        pass

    class Strange(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self):
            return {"of nobody's knowledge": object()}

    engines = [make(2, FOLDER / "path", attached=False, extra=bool(number)) for number in range(2)]
    began = [engine.global_steps for engine in engines]
    odd = make(0, FOLDER / "path", attached=False, optimizer=partial(Odd, lr=0.1))
    train(odd, 1)
    odd.save_checkpoint(FOLDER / "odd")
    path, _ = odd.load_checkpoint(FOLDER / "odd")
    assert path.endswith(".pt"), path
    strange = make(0, FOLDER / "path", attached=False, scheduler=Strange)
    train(strange, 1)
    for number, engine in enumerate(engines):
        train(engine, steps + number)
    return began


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def run(steps, expected):
    from deepspeed import comm

    warnings = Warnings()
    logging.getLogger("spotspeed").addHandler(warnings)
    three_lines((0, 0) if expected == [0, 0] else (2, 20))
    began = script(steps)
    assert began == expected, began
    said = [text for text in warnings.texts if "not protected by spotspeed" in text]
    assert len(said) == 2 and "Odd" in said[0], warnings.texts
    assert "of nobody's knowledge" in said[1], said
    # Scripts end so; what is newer than the last save is saved all the same.
    comm.destroy_process_group()
    print(f"began at {began}", flush=True)


if __name__ == "__main__":
    if MODE == "first":
        import spotspeed

        spotspeed.install()
        run(2, [0, 0])
    else:
        # This process has no engine: the hooks are for those that it starts.
        from spotspeed import children

        children.pass_on()
        process = multiprocessing.get_context("spawn").Process(target=run, args=(1, [2, 3]))
        process.start()
        process.join()
        sys.exit(process.exitcode)
