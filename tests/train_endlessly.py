"""Begin or go on with the run in the folder given; say the first step as soon as it is made, and when all is done."""

import sys
from pathlib import Path

from training import TINY, CountedData

from pyllm.train import Callbacks, StepReport, TrainConfig, Trainer


class Say(Callbacks):
    """Prints each step."""

    def stepped(self, report: StepReport) -> None:
        """The test kills the process after the first line."""
        print("step", report.step, flush=True)


out = Path(sys.argv[1])
config = TrainConfig(
    out, steps=120, save_every=1, accumulation=1, learning_rate=3e-3, warmup_steps=2, dropout=0.1, threads=2
)
Trainer(TINY, CountedData(), config, callbacks=[Say()], resume=(out / "last").exists()).run()
print("done", flush=True)
