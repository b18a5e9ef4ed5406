"""TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyllm.errors import ConfigError
from pyllm.train.report import Callbacks, EvalReport, Sample, StepReport


class TensorBoard(Callbacks):
    """Writes event files into `folder`; `ConfigError` where the package is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise ConfigError("tensorboard is not installed: pip install 'pyllm[tensorboard]'") from error
        self._writer: Any = Writer(str(folder))

    def stepped(self, report: StepReport) -> None:
        """A step."""
        for name, value in _step_values(report).items():
            self._writer.add_scalar(name, value, report.step)

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation."""
        for name, value in _eval_values(report).items():
            self._writer.add_scalar(name, value, report.step)

    def saved(self, step: int, folder: Path) -> None:
        """Let what is buffered be seen."""
        self._writer.flush()


class WeightsAndBiases(Callbacks):
    """Logs into a project; `ConfigError` where the package is missing."""

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb is not installed: pip install 'pyllm[wandb]'") from error
        self._wandb: Any = wandb
        self._run: Any = wandb.init(project=project, name=folder.name, dir=str(folder), config=settings)

    def stepped(self, report: StepReport) -> None:
        """A step."""
        self._run.log(_step_values(report), step=report.step)

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation."""
        self._run.log(_eval_values(report), step=report.step)

    def sampled(self, sample: Sample) -> None:
        """A sample."""
        self._run.log(
            {"sample": self._wandb.Html(f"<pre>{_escaped(sample.prompt + sample.text)}</pre>")}, step=sample.step
        )


def _step_values(report: StepReport) -> dict[str, float]:
    return {
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/gradient_norm": report.gradient_norm,
        "train/tokens_per_second": report.tokens_per_second,
    }


def _eval_values(report: EvalReport) -> dict[str, float]:
    values = {"loss": report.loss, "perplexity": report.perplexity, "accuracy": report.accuracy}
    return {f"eval/{name}": value for name, value in values.items() if value is not None}


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
