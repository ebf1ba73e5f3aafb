"""The main job, end to end: train on real text, interrupt, resume on another number of ranks.

    make demo

Trains examples/train_gpt.py once without interruption and once through three of them: SIGUSR1 to
one rank under mpirun, SIGTERM to one rank under the `deepspeed` launcher, SIGKILL of every rank
with no notice. Prints what each one cost, draws both loss curves, and exits with 1 when a promise
did not hold.
"""

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.table import Table

import spotspeed

HERE = pathlib.Path(__file__).resolve().parent
TOLERANCE = 2e-3
"""Largest difference of the loss that another order of summation may make (fp32 training)."""
EVERY = 10
"""Steps between periodic saves; what a kill without notice may cost at most."""
console = Console(highlight=False, width=150)


@dataclass(frozen=True, slots=True)
class Leg:
    """One launch: on how many ranks, by what, and how it is to be interrupted."""

    ranks: int
    launcher: str
    interruption: str | None
    after_step: int = 0


@dataclass(slots=True)
class Outcome:
    """What one launch did, and what its interruption cost."""

    leg: Leg
    exit_code: int
    first_step: int
    last_step: int
    launch_s: float
    durable_s: float | None = None
    size_bytes: int = 0
    sealed_step: int = 0
    complaints: list[str] = field(default_factory=list)


class Run:
    """One training run in its own folder: config, log of losses, checkpoints."""

    def __init__(self, folder: pathlib.Path, steps: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.steps = folder, steps
        self.log, self.output = folder / "losses.jsonl", folder / "output.txt"
        config = json.loads((HERE / "ds_config.json").read_text())
        config["spotspeed"]["path"] = str(folder / "checkpoints")
        config["spotspeed"]["interval"] = {"steps": EVERY, "seconds": None}
        self.config = folder / "ds_config.json"
        self.config.write_text(json.dumps(config, indent=2))

    def records(self) -> list[dict]:
        """Every step that was logged, in the order of its happening."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def command(self, leg: Leg) -> list[str]:
        script = [str(HERE / "train_gpt.py"), "--config", str(self.config),
                  "--steps", str(self.steps), "--log", str(self.log)]  # fmt: skip
        scripts = pathlib.Path(sys.executable).parent
        if leg.launcher == "deepspeed":
            return [str(scripts / "deepspeed"), "--num_gpus", str(leg.ranks),
                    "--master_port", str(free_port()), *script]  # fmt: skip
        return [str(scripts / "mpirun"), "-n", str(leg.ranks), "--allow-run-as-root",
                "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none",
                sys.executable, *script]  # fmt: skip

    def play(self, leg: Leg, chance: random.Random) -> Outcome:
        """Launch, wait for the moment, interrupt, wait for the end."""
        before = len(self.records())
        environment = os.environ | {"MASTER_PORT": str(free_port())}
        launched = time.time()
        with self.output.open("ab") as output:
            process = subprocess.Popen(
                self.command(leg), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        noticed = None
        while process.poll() is None:
            new = self.records()[before:]
            if leg.interruption and noticed is None and new and new[-1]["step"] >= leg.after_step:
                time.sleep(chance.uniform(0.0, 0.3))
                noticed = time.time()
                interrupt(process, leg.interruption, chance)
            show(leg, new, self.steps)
            time.sleep(0.05)
        new = self.records()[before:]
        console.print()
        if not new:
            tail = self.output.read_text(errors="replace").splitlines()[-25:]
            raise SystemExit("\n".join(["the launch made no step; its last lines:", *tail]))
        outcome = Outcome(leg, process.returncode, new[0]["step"], new[-1]["step"],
                          new[0]["unix_s"] - launched)  # fmt: skip
        self.settle(outcome, noticed)
        return outcome

    def settle(self, outcome: Outcome, noticed: float | None) -> None:
        """Look at what is durable now, and hold it against the promises."""
        newest = spotspeed.list_checkpoints(str(self.folder / "checkpoints"))[0]
        manifest = self.folder / "checkpoints" / newest.directory / "manifest.json"
        outcome.sealed_step, outcome.size_bytes = newest.step, newest.size_bytes
        leg, complaints = outcome.leg, outcome.complaints
        if leg.interruption in ("SIGUSR1", "SIGTERM") and noticed is not None:
            outcome.durable_s = manifest.stat().st_mtime - noticed
            if newest.step != outcome.last_step:
                complaints.append(f"durable at step {newest.step}, not {outcome.last_step}")
            if outcome.exit_code != 75:
                complaints.append(f"exit code {outcome.exit_code}, not 75")
        elif leg.interruption is None:
            if outcome.exit_code != 0 or outcome.last_step != self.steps:
                complaints.append(f"exit {outcome.exit_code} at step {outcome.last_step}")
        elif outcome.last_step - newest.step > EVERY:
            complaints.append(f"lost {outcome.last_step - newest.step} steps, more than {EVERY}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_processes(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """The training processes below a launcher, by rank."""
    ranks = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            environment, words = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        rank = environment.get("OMPI_COMM_WORLD_RANK", environment.get("RANK"))
        trains = words[1:] and "train_gpt.py" in " ".join(words[1:4])
        if rank is not None and trains and "deepspeed.launcher.launch" not in words:
            ranks.setdefault(int(rank), process)
    return ranks


def interrupt(launcher: subprocess.Popen, how: str, chance: random.Random) -> None:
    ranks = rank_processes(launcher)
    if how == "SIGKILL":
        for process in ranks.values():
            process.kill()
        return
    target = chance.choice([rank for rank in ranks if rank != 0] or [0])
    ranks[target].send_signal(signal.Signals[how])


def count(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def show(leg: Leg, new: list[dict], steps: int) -> None:
    """One progress line that rewrites itself on a terminal."""
    step = f"step {new[-1]['step']:3d}/{steps} loss {new[-1]['loss']:.3f}" if new else "starting"
    what = leg.interruption or "to the end"
    text = f"  {count(leg.ranks):7s} {leg.launcher:9s} {what:10s} {step}"
    if console.is_terminal:
        console.print(text, end="\r")
    elif new and new[-1]["step"] % 20 == 0 and show.last != (leg, new[-1]["step"]):
        console.print(text)
        show.last = (leg, new[-1]["step"])


show.last = None


def final_losses(run: Run) -> dict[int, float]:
    """Loss by step, the last time each step was trained."""
    return {record["step"]: record["loss"] for record in run.records()}


def largest_difference(outcome: Outcome, run: Run, reference: dict[int, float]) -> float:
    """Over the steps of this launch, including those that were lost afterwards."""
    wanted = range(outcome.first_step, outcome.last_step + 1)
    rows = [r for r in run.records() if r["step"] in wanted and r["ranks"] == outcome.leg.ranks]
    return max((abs(r["loss"] - reference[r["step"]]) for r in rows), default=math.nan)


def print_table(outcomes: list[Outcome], run: Run, reference: dict[int, float]) -> float:
    table = Table(title="What each interruption cost")
    for name in (
        "launch", "what happened", "at step", "ranks", "resumed on", "steps lost",
        "notice to durable", "launch to first step", "bytes", "loss difference",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    worst = 0.0
    for index, outcome in enumerate(outcomes):
        leg = outcome.leg
        difference = largest_difference(outcome, run, reference)
        worst = max(worst, difference)
        following = outcomes[index + 1] if index + 1 < len(outcomes) else None
        lost = outcome.last_step - following.first_step + 1 if following else 0
        if following and following.first_step != outcome.sealed_step + 1:
            outcome.complaints.append(
                f"sealed at {outcome.sealed_step}, resumed with step {following.first_step}"
            )
        table.add_row(
            leg.launcher, leg.interruption or "finished", str(outcome.last_step), str(leg.ranks),
            str(following.leg.ranks) if following else "-", str(lost),
            "-" if outcome.durable_s is None else f"{outcome.durable_s:.2f} s",
            f"{outcome.launch_s:.1f} s", f"{outcome.size_bytes:,}", f"{difference:.1e}",
        )  # fmt: skip
    console.print(table)
    return worst


def draw(run: Run, reference: dict[int, float], outcomes: list[Outcome]) -> pathlib.Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    axes.plot(list(reference), list(reference.values()), color="black", linewidth=3, alpha=0.35,
              label="uninterrupted, 2 ranks")  # fmt: skip
    for color, outcome in zip(("tab:blue", "tab:green", "tab:orange", "tab:purple"), outcomes,
                              strict=False):  # fmt: skip
        wanted = range(outcome.first_step, outcome.last_step + 1)
        rows = [r for r in run.records()
                if r["step"] in wanted and r["ranks"] == outcome.leg.ranks]  # fmt: skip
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color,
                  label=f"{count(outcome.leg.ranks)}, {outcome.leg.launcher}")  # fmt: skip
        if outcome.leg.interruption:
            axes.axvline(outcome.last_step, color="tab:red", linestyle=":", linewidth=1)
            axes.annotate(outcome.leg.interruption, (outcome.last_step, axes.get_ylim()[1]),
                          rotation=90, ha="right", va="top", color="tab:red")  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)",
             title="Interrupted three times, resumed on 3, 1 and 2 ranks")  # fmt: skip
    axes.legend()
    figure.tight_layout()
    picture = run.folder.parent / "loss.png"
    figure.savefig(picture, dpi=120)
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo_out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    chance, steps, began = random.Random(arguments.seed), arguments.steps, time.time()
    console.print(f"[bold]spotspeed demo[/bold], seed {arguments.seed}, {steps} steps of a GPT on "
                  f"the standard library's sources, ZeRO-2, output in {arguments.out}")  # fmt: skip
    console.print("reference run, without interruption")
    reference_run = Run(arguments.out.absolute() / "reference", steps)
    outcomes = [reference_run.play(Leg(2, "mpirun", None), chance)]
    reference = final_losses(reference_run)

    console.print("the same run, interrupted three times")
    run = Run(arguments.out.absolute() / "interrupted", steps)
    moment = [int(steps * part) + chance.randint(-5, 5) for part in (0.25, 0.5, 0.75)]
    legs = [Leg(2, "mpirun", "SIGUSR1", moment[0]), Leg(3, "deepspeed", "SIGTERM", moment[1]),
            Leg(1, "mpirun", "SIGKILL", moment[2]), Leg(2, "mpirun", None)]  # fmt: skip
    outcomes += [run.play(leg, chance) for leg in legs]

    worst = print_table(outcomes[1:], run, reference)
    console.print(f"both loss curves: {draw(run, reference, outcomes[1:])}")
    complaints = [text for outcome in outcomes for text in outcome.complaints]
    if worst > TOLERANCE or math.isnan(worst):
        complaints.append(f"the loss differs by {worst:.1e} from the reference, > {TOLERANCE:.0e}")
    if set(final_losses(run)) != set(range(1, steps + 1)):
        complaints.append("some steps were never trained")
    for text in complaints:
        console.print(f"[red]broken:[/red] {text}")
    verdict = "NOT EVERY PROMISE HELD" if complaints else "every promise held"
    console.print(f"[bold]{verdict}[/bold] ({time.time() - began:.0f} s)")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
