"""The kernels that training needs beyond those of inference: backward passes, losses, the optimizer.

Conventions as in :mod:`pyllm.ops`. Gradients of parameters accumulate (``+=``), gradients of activations overwrite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import (
    ACTIVATIONS,
    F32,
    F64,
    NORMS,
    POOLINGS,
    Array,
    AttentionRule,
    Dropout,
    Ops,
    check_weights_of_heads,
)
from pyllm.spec import Activation, NormKind, Pooling

if TYPE_CHECKING:
    from typing_extensions import Unpack

IGNORED_LABEL: int = _cpu.IGNORED_LABEL


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

    def clamp_backward(self, dx: F32, x: F32, limit: float) -> None:
        """dx [R, D] becomes 0 where x, which has been clamped, lies at a limit."""
        self.context.clamp_backward(dx, x, limit)

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
        with, to clip them. `narrow`, a bfloat16 matrix of which params are the panels in float32,
        receives the new weights, rounded. With `clear` grads are zero afterwards, for the sums of the next step.
        """
        self.context.adamw(params, grads, m, v, hyper, weight_decay, narrow, clear)

    def square_norm(self, out: F64, x: F32) -> None:
        """``out[0] += sum(x**2)``: float32 in blocks, these in float64, in a fixed order; out float64 [1], x flat."""
        self.context.square_norm(out, x)

    # Layers, attention, losses

    def norm_backward(
        self,
        dy: F32,
        x: F32,
        weight: F32 | None,
        *,
        kind: NormKind,
        eps: float,
        dweight: F32 | None = None,
        dbias: F32 | None = None,
        residual: F32 | None = None,
        out: F32 | None = None,
    ) -> F32:
        """Gradient of :meth:`norm` with respect to x, plus `residual`: dy and x [R, D], or [T, H, E] -> the same.

        `x` is what was normalised, the sum where there was a residual; its statistics are computed anew. `dweight` and
        `dbias` [D] accumulate, in an order of their own that depends on R alone. `out` may be dy or residual. Weights
        of each head [H, E] are as in :meth:`norm`, with a `dweight` like them.
        """
        out = self.empty(*dy.shape) if out is None else out
        if weight is not None and weight.ndim == 2:
            check_weights_of_heads(x, weight)
            for head in range(len(weight)):
                added, total = (None if a is None else a[at] for a, at in ((residual, np.s_[:, head]), (dweight, head)))
                self.context.norm_backward(
                    out[:, head], total, dbias, dy[:, head], x[:, head], weight[head], added, eps, NORMS[kind]
                )
            return out
        self.context.norm_backward(out, dweight, dbias, dy, x, weight, residual, eps, NORMS[kind])
        return out

    def embedding_backward(
        self,
        dtable: _cpu.PackedMatrix | F32,
        dposition_table: F32 | None,
        dy: F32,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32] | None,
        d_type_table: F32 | None = None,
        types: NDArray[np.int32] | None = None,
    ) -> None:
        """``dtable[tokens] += dy``, ``dposition_table[positions] += dy``, ``d_type_table[types] += dy``: dy [T, D], ids
        int32 [T].

        dtable [V, D] is packed float32 or plain; dposition_table [P, D], d_type_table [S, D]. Rows that several tokens
        share receive them in the order of the tokens.
        """
        self.context.embedding_backward(dtable, dposition_table, d_type_table, dy, tokens, positions, types)

    def gather_backward(self, dx: F32, dy: F32, index: NDArray[np.int32]) -> F32:
        """Gradient of :meth:`gather`: dx [T, D] becomes 0, then ``dx[index] += dy``, dy [R, D], in order. Gives dx."""
        self.context.gather_backward(dx, dy, index)
        return dx

    def pool_backward(self, dx: F32, dy: F32, starts: NDArray[np.int32], pooling: Pooling, x: F32 | None = None) -> F32:
        """Gradient of :meth:`pool`: dy [B, D] -> dx [T, D], overwritten. Gives dx.

        x [T, D], what was pooled, is needed for the maximum, whose gradient goes to the first row that has it.
        """
        self.context.pool_backward(dx, dy, x, starts, POOLINGS[pooling])
        return dx

    def gather_columns_backward(self, dx: F32, dy: F32, index: NDArray[np.int32]) -> None:
        """``dx[:, index] += dy``, the gradient of :meth:`gather_columns`, column after column: dx [R, D], dy [R, N]."""
        self.context.gather_columns_backward(dx, dy, index)

    def attention_backward(
        self,
        dout: F32,
        out: F32,
        q: F32,
        cache: Array,
        lse: F32,
        starts: NDArray[np.int32],
        lengths: NDArray[np.int32],
        tables: NDArray[np.int32],
        *,
        head_size: int,
        scale: float,
        dropout: Dropout | None = None,
        gradients: tuple[F32, F32, F32] | None = None,
        dbias: F32 | None = None,
        add_dbias: bool = False,
        **rule: Unpack[AttentionRule],
    ) -> tuple[F32, F32, F32]:
        """Gradients of :meth:`attention` with respect to q, keys and values: dout [T, H * E] -> dq, dk, dv.

        `out`, `lse` and the other arguments are those of the forward pass. The cache is float32 or bfloat16. dk and dv
        [S, G * E], of the S keys of all sequences in turn, belong to keys as they stand in the cache, rotated.
        `gradients` (dq, dk, dv) may be slices of one array; they are overwritten; where None, S are the present
        lengths. A sequence's gradients depend on nothing in other sequences; with dropout, on its place among the rows.
        `dbias`, like the rule's bias, is overwritten too, or added to with `add_dbias`.
        """
        if gradients is None:
            shape = int(lengths.sum()), cache.shape[1] * head_size
            gradients = self.empty(*q.shape), self.empty(*shape), self.empty(*shape)
        self.context.attention_backward(
            *gradients, dout, out, q, cache, lse, starts, lengths, tables, head_size, scale, dropout=dropout,
            dbias=dbias, add_dbias=add_dbias, **rule,
        )  # fmt: skip
        return gradients

    def dropout(
        self,
        x: F32,
        rate: float,
        seed: NDArray[np.uint64],
        site: int,
        out: F32 | None = None,
        residual: F32 | None = None,
    ) -> F32:
        """x [R, D] with elements set to 0 at `rate` and the others divided by 1 - rate, plus `residual` [R, D].

        Which ones is a function of seed (uint64 [1], read when the kernel runs), site, row and column: the same call on
        a gradient is the backward pass. `out` may be x or residual.
        """
        out = self.empty(*x.shape) if out is None else out
        self.context.dropout(out, x, residual, (rate, seed, site))
        return out

    def cross_entropy(
        self,
        logits: F32,
        labels: NDArray[np.int32],
        scale: F32 | None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        loss: F32 | None = None,
    ) -> F32:
        """Softmax cross-entropy of logits [R, V], which become their gradient times `scale` [1] -> loss [R].

        Where `scale` is None there are losses only, and logits stay as they are.

        labels int32 [R]; rows with IGNORED_LABEL, -100, have no loss and no gradient. A row's loss, not scaled, is ``(1
        - label_smoothing) * (lse - logits[label]) + label_smoothing * (lse - mean(logits)) + z_loss * lse**2``.
        """
        loss = self.empty(logits.shape[0]) if loss is None else loss
        self.context.cross_entropy(logits, loss, labels, scale, z_loss, label_smoothing)
        return loss

    def sigmoid_cross_entropy(self, x: F32, targets: F32, scale: F32 | None, *, loss: F32 | None = None) -> F32:
        """Sigmoid cross-entropy of logits x [R, N], which become their gradient times `scale` [1] -> loss [R].

        A row's loss is the sum of ``log(1 + e^x) - x * target``. Where `scale` is None there are losses only, and x
        stays as it is. targets [R, N] are probabilities, or NaN where an element does not count.
        """
        loss = self.empty(x.shape[0]) if loss is None else loss
        self.context.sigmoid_cross_entropy(x, loss, targets, scale)
        return loss

    def squared_error(self, x: F32, targets: F32, scale: F32 | None, *, loss: F32 | None = None) -> F32:
        """``(x - target)^2`` summed over each row, with gradients; arguments as in :meth:`sigmoid_cross_entropy`."""
        loss = self.empty(x.shape[0]) if loss is None else loss
        self.context.squared_error(x, loss, targets, scale)
        return loss
