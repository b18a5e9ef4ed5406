"""One engine that trains a GPT-2 on random tokens, for bench_train.py: a line on stdin is a step, its answer is JSON.

    python bench/train_worker.py {pyllm,torch} {float32,bfloat16} SEQUENCES LENGTH CONFIG_JSON THREADS

A step is forward, loss, backward, clipping to norm 1 and AdamW on all weights. Answers hold the seconds, the loss and
the most memory that the process ever took, without what it takes before the model is made.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Make the engine, then one step a line."""
    engine, dtype, sequences, length, config, threads = sys.argv[1:]
    make = {"pyllm": pyllm, "torch": torch_}[engine]
    step, before = make(dtype, int(sequences), int(length), json.loads(config), int(threads))
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "bytes": peak() - before}), flush=True)


def batches(sequences: int, length: int, vocab: int) -> Callable[[], tuple[Any, Any]]:
    """Random tokens and the labels that follow them, [sequences, length] each."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[Any, Any]:
        ids = rng.integers(0, vocab, (sequences, length + 1))
        return ids[:, :-1], ids[:, 1:]

    return draw


def pyllm(dtype: str, sequences: int, length: int, config: dict[str, Any], threads: int) -> tuple[Any, int]:
    """Our trainer."""
    from pyllm.train import TrainConfig, Trainer

    draw = batches(sequences, length, config["vocab_size"])

    class Random:
        def next_batch(self) -> Any:
            ids, labels = (array.astype(np.int32).reshape(-1) for array in draw())
            return ids, labels, np.arange(sequences + 1, dtype=np.int32) * length

        def state(self) -> dict[str, Any]:
            return {}

        def load_state(self, state: dict[str, Any]) -> None:
            pass

    before = peak()
    settings = TrainConfig(Path("unused"), steps=1 << 30, dtype=dtype, threads=threads, schedule="constant")
    trainer = Trainer(config, Random(), settings)
    return lambda: trainer.step().loss, before


def torch_(dtype: str, sequences: int, length: int, config: dict[str, Any], threads: int) -> tuple[Any, int]:
    """transformers' model; AdamW is fused where the allocator is tuned too (GLIBC_TUNABLES is set)."""
    import os

    import torch
    import transformers

    torch.set_num_threads(threads)
    draw = batches(sequences, length, config["vocab_size"])
    before = peak()
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            config["model_type"], **fields, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
    )
    fused = "GLIBC_TUNABLES" in os.environ
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=fused)

    def step() -> float:
        ids, labels = (torch.from_numpy(array) for array in draw())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, before


def peak() -> int:
    """Bytes: the most this process has had in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
