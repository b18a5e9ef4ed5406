"""Begin or go on with a run in the folder given, of so many steps; say each step as it is made, and the end."""

import sys
from pathlib import Path

from training import TINY, CountedData

from pyllm.train import Callbacks, StepReport, TrainConfig, Trainer


class Say(Callbacks):
    """Prints each step."""

    def stepped(self, report: StepReport) -> None:
        """The test kills the process after the first line."""
        print("step", report.step, flush=True)


out, steps = Path(sys.argv[1]), int(sys.argv[2])
config = TrainConfig(
    out, steps=steps, save_every=1, accumulation=1, learning_rate=3e-3, warmup_steps=2, dropout=0.1, threads=2
)
Trainer(TINY, CountedData(), config, callbacks=[Say()], resume=(out / "last").exists()).run()
print("done", flush=True)
