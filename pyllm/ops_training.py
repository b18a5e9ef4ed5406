"""The kernels that training needs beyond those of inference: backward passes, losses, the optimizer.

Conventions as in :mod:`pyllm.ops`. Gradients of parameters accumulate (``+=``), gradients of activations overwrite.
"""

from __future__ import annotations

from pyllm.ops import Ops


class TrainingOps(Ops):
    """Kernel calls of inference and of training; see :class:`pyllm.ops.Ops`."""

    # Matrices and the optimizer

    # Layers, attention, losses
