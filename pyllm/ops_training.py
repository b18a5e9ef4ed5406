"""The kernels that training needs beyond those of inference: backward passes, losses, the optimizer.

Conventions as in :mod:`pyllm.ops`. Gradients of parameters accumulate (``+=``), gradients of activations overwrite.
"""

from __future__ import annotations

from pyllm import _cpu
from pyllm.ops import ACTIVATIONS, F32, F64, Ops
from pyllm.spec import Activation


class TrainingOps(Ops):
    """Kernel calls of inference and of training; see :class:`pyllm.ops.Ops`."""

    # Matrices and the optimizer

    def matmul_dx(self, dy: F32, w: _cpu.PackedMatrix, out: F32 | None = None, add: bool = False) -> F32:
        """``dy w``, the gradient of the input of :meth:`matmul`: dy [T, N], w float32, float16 or bfloat16 -> [T, K].

        dy is the gradient of the pre-activations; for a gated w it is [T, 2N], gate then up. With `add` it is added to
        what `out` holds.
        """
        if out is None:
            if add:
                raise ValueError("add: expected an out to add to, got None")
            out = self.empty(dy.shape[0], w.shape[1])
        self.context.matmul_dx(out, dy, w, add)
        return out

    def matmul_dw(self, dw: _cpu.PackedMatrix, dy: F32, x: F32) -> None:
        """``dw += dy^T x``, the gradient of the weights of :meth:`matmul`: dw float32 [N, K], dy as in
        :meth:`matmul_dx`, x [T, K].

        Rows are added one after the other to what dw holds, so the rows of a step may be cut into several calls.
        """
        self.context.matmul_dw(dw, dy, x)

    def column_sum(self, out: F32, x: F32) -> None:
        """``out += x.sum(0)``, row after row: out [N], x [T, N]."""
        self.context.column_sum(out, x)

    def activation_backward(
        self, dy: F32, pre: F32, activation: Activation | None, gated: bool = False, out: F32 | None = None
    ) -> F32:
        """``dy * act'(pre)``: dy and pre [T, F] -> [T, F].

        Gated, of ``act(gate) * up`` with pre [T, 2F], gate then up: its gradient [T, 2F]. `out` may be `pre`, or where
        not gated `dy`.
        """
        out = self.empty(*pre.shape) if out is None else out
        self.context.activation_backward(out, dy, pre, ACTIVATIONS[activation], gated)
        return out

    def adamw(
        self,
        params: F32,
        grads: F32,
        m: F32,
        v: F32,
        hyper: F64,
        weight_decay: float,
        narrow: _cpu.PackedMatrix | None = None,
        clear: bool = False,
    ) -> None:
        """One step of AdamW (Loshchilov & Hutter, arXiv:1711.05101) as torch.optim.AdamW makes it, in place.

        params, grads, and the moments m and v are flat and of one length. hyper is float64 [7], read when the step is
        run: rate, beta1, beta2, eps, ``1 - beta1**t``, ``1 - beta2**t``, and a factor that gradients are multiplied
        with (see :meth:`clip_coefficient`). `narrow`, a bfloat16 matrix of which params are the panels in float32,
        receives the new weights, rounded. With `clear` grads are zero afterwards, for the sums of the next step.
        """
        self.context.adamw(params, grads, m, v, hyper, weight_decay, narrow, clear)

    def square_norm(self, out: F64, x: F32) -> None:
        """``out[0] += sum(x**2)``, in float64 and in a fixed order: out float64 [1], x flat."""
        self.context.square_norm(out, x)

    def clip_coefficient(self, out: F64, square: F64, max_norm: float) -> None:
        """``out[0] = min(1, max_norm / (sqrt(square[0]) + 1e-6))``, float64 [1] both.

        Gradients whose squares sum to `square` and that are multiplied with it have a norm of at most `max_norm`. `out`
        may be ``hyper[6:]`` of :meth:`adamw`.
        """
        self.context.clip_coefficient(out, square, max_norm)

    # Layers, attention, losses
