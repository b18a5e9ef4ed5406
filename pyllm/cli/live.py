"""The line that shows how a training run goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pyllm.cli.output import is_quiet, note
from pyllm.limits import peak_gflops
from pyllm.spec import HeadKind, ModelSpec
from pyllm.train.report import Callbacks, EvalReport, Sample, StepReport
from pyllm.train.setup import DEFAULT_CONTEXT

EVERY = 10.0  # seconds between lines where stderr is no terminal


class LiveLine(Callbacks):
    """Loss, rate, norm, speed, share of the machine's peak and time left: one line, written anew; or a line now and
    then where stderr is no terminal. A `context` of 0 stands for the default one; `of_sources` is the share of tokens
    that an encoder beside the decoder reads."""

    def __init__(self, spec: ModelSpec, context: int, dtype: str, threads: int, of_sources: float = 0.0) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        context = context or min(DEFAULT_CONTEXT, spec.max_positions)
        self._operations = operations_per_token(spec, context, of_sources)
        self._of_tokens = spec.head.kind is HeadKind.TOKENS
        self._peak = 0.0 if is_quiet() else peak_gflops(dtype, threads) * 1e9
        self._steps, self._first, self._began, self._shown = 1, 0, time.monotonic(), 0.0
        self._open = False

    def started(self, step: int, steps: int, parameters: int) -> None:
        """The run begins."""
        self._steps, self._first, self._began = steps, step, time.monotonic()

    def stepped(self, report: StepReport) -> None:
        """A step."""
        now = time.monotonic()
        if not self._terminal and now - self._shown < EVERY and report.step not in (self._first + 1, self._steps):
            return
        self._shown = now
        left = (now - self._began) / (report.step - self._first) * (self._steps - report.step)
        share = self._operations * report.tokens_per_second / self._peak if self._peak else 0.0
        line = (
            f"step {report.step}/{self._steps} | loss {report.loss:.4f} | rate {report.learning_rate:.2e} | "
            f"norm {report.gradient_norm:.2f} | {report.tokens_per_second:.0f} tok/s | {share:.0%} of peak | "
            f"{_clock(left)} left"
        )
        if self._terminal and not is_quiet():
            sys.stderr.write("\r\x1b[K" + line)
            sys.stderr.flush()
            self._open = True
        else:
            note(line)

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation."""
        more = f", perplexity {report.perplexity:.3f}" if self._of_tokens else ""
        if report.accuracy is not None:
            more = f", accuracy {report.accuracy:.4f} of {report.tokens} labels"
        best = " (best)" if report.best else ""
        self._line(f"step {report.step}: held-out loss {report.loss:.4f}{more}{best}")

    def sampled(self, sample: Sample) -> None:
        """A sample."""
        self._line(f"step {sample.step}: {sample.prompt}|{sample.text}")

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint."""
        self._line(f"step {step}: saved {folder}")

    def clear(self) -> None:
        """End the line."""
        if self._open:
            self._open = False
            note()

    def _line(self, text: str) -> None:
        self.clear()
        note(text)


def operations_per_token(spec: ModelSpec, context: int, of_sources: float = 0.0) -> float:
    """Multiplications and additions of a token in a sequence of `context`, forward and, twice as many, backward.

    The head reads every token, or one; what checkpointed activations compute again is not counted. With an encoder it
    is the mean over its tokens, `of_sources` of all, and the decoder's, which attend to sources as long as the context.
    """
    others = 0 if spec.head.kind.is_pooled else context - 1  # tokens that the head reads beside one
    head_of_others = 2 * others * spec.outputs * spec.head_width
    own = (spec.operations(context) + head_of_others) / context
    if spec.encoder is None:
        return 3 * own
    cross = [block.cross for block in spec.blocks if block.cross is not None]
    own += sum(4 * a.heads * a.head_dim for a in cross) * context
    read = (spec.encoder.operations(context) - 2 * spec.encoder.outputs * spec.encoder.head_width) / context
    read += sum(4 * a.kv_heads * a.head_dim for a in cross) * spec.hidden
    return 3 * ((1 - of_sources) * own + of_sources * read)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
