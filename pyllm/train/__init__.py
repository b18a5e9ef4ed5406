"""Training on the kernels that also generate.

    from pyllm.train import TrainConfig, Trainer

    config = TrainConfig(out=Path("run"), steps=2000, learning_rate=1e-3, warmup_steps=100)
    trainer = Trainer(model, data, config, eval_data=held_out, tokenizer=folder, callbacks=[Log()])
    result = trainer.run()

`model` is a folder (training goes on from its weights) or the content of a config.json (weights are drawn as its
family was published). `data` and `eval_data` are objects of the protocol :class:`Data`: `next_batch()`, `state()`,
`load_state()`. `tokenizer` is a folder whose tokenizer files are copied into the checkpoints, and used for samples.
With ``resume=True`` the run goes on from ``config.out / "last"``, bit for bit as if it had not been interrupted.

``Trainer(model, RepeatedData(data, n), config)`` overfits the first n micro-batches, and
:meth:`Trainer.check_gradients` compares gradients with slopes: two checks of a setup. `plan_training` tells the memory
of a run before anything is laid out.

Nothing here prints: what happens goes to `callbacks`, see :class:`Callbacks`. :meth:`Trainer.stop` asks a run to save
and end after the step being made; it may be called from a signal handler.

A run's folder holds ``step-<n>`` folders, and the links ``last`` and ``best`` to two of them. Each is a model in the
Hugging Face layout, which loads like any other, with the training state beside it.
"""

from __future__ import annotations

from pyllm.train.checks import GradientCheck, RepeatedData
from pyllm.train.memory import StepShape, TrainPlan, plan_training
from pyllm.train.report import Callbacks, Data, EvalReport, Sample, StepReport, TrainResult
from pyllm.train.settings import TrainConfig, learning_rate
from pyllm.train.trainer import Trainer

__all__ = [
    "Callbacks",
    "Data",
    "EvalReport",
    "GradientCheck",
    "RepeatedData",
    "Sample",
    "StepReport",
    "StepShape",
    "TrainConfig",
    "TrainPlan",
    "TrainResult",
    "Trainer",
    "learning_rate",
    "plan_training",
]
