"""How many recorded steps of decoding are kept: enough for a mixed load, no more than a GPU has room for."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
from emulated_cuda import emulated_gpu

from pyllm import LLM, SamplingParams, cuda_limits
from pyllm.engine.recorded import MOST_STEPS, RecordedSteps, StepKind, step_bytes, steps_kept, table_widths
from pyllm.engine.sequence import Sequence
from pyllm.models import open_checkpoint

GB = 10**9


@pytest.fixture(scope="module")
def spec(tiny_folder):
    with open_checkpoint(tiny_folder) as checkpoint:
        return checkpoint.spec


def test_tables_have_a_few_widths_on_a_gpu_and_one_on_the_cpu():
    assert table_widths(100, on_gpu=False) == (100,)
    assert table_widths(8, on_gpu=True) == (8,)
    assert table_widths(100, on_gpu=True) == (8, 32, 100)
    assert table_widths(2049, on_gpu=True) == (8, 32, 128, 512, 2048, 2049)


@pytest.mark.parametrize(
    ("sequences", "rows", "blocks", "memory", "expected"),
    [
        (32, 32, 2048, None, 32),  # the CPU: one for each number of sequences
        (4, 32, 2048, None, 128),  # drafts: any number of rows
        (1 << 20, 1 << 20, 2048, None, MOST_STEPS),
        (8, 8, 32, 80 * GB, 8 * 2 * 2),  # a GPU: two widths, with logits or not
        (32, 32, 2048, 80 * GB, MOST_STEPS),
    ],
)
def test_steps_of_all_kinds_are_kept(spec, sequences, rows, blocks, memory, expected):
    assert steps_kept(spec, sequences, rows, blocks, memory) == expected


def test_memory_bounds_the_steps_of_a_gpu(spec):
    one = step_bytes(spec, 32, 512)
    assert one > 32 * 512 * 4
    assert steps_kept(spec, 32, 32, 512, 10 * one + 1) == 10
    assert steps_kept(spec, 32, 32, 512, 0) == 1


def test_the_step_that_was_used_longest_ago_goes_first():
    recorded, steps = Counter(), RecordedSteps(2)
    for sequences in (1, 2, 1, 3, 1, 2):
        kind = StepKind(sequences, sequences, 8, False)
        assert steps.get(kind, lambda kind: recorded.update([kind.sequences]) or kind) == kind
    assert recorded == {1: 1, 2: 2, 3: 1} and len(steps) == 2


def test_what_is_kept_keeps_no_sequence(tiny_folder):
    def alive():
        gc.collect()
        return sum(type(each) is Sequence for each in gc.get_objects())

    llm, before = LLM(tiny_folder, device="cpu", max_model_len=64), alive()
    for prompts in (["one", "two", "the"], ["one", "two"], ["one"]):
        llm.generate(prompts, max_tokens=4, ignore_eos=True)
    assert len(llm._runner._recorded) == 3 and alive() == before + 1  # the engine knows the last one


def test_a_model_that_is_let_go_of_gives_its_memory_back_at_once(tiny_folder):
    """No cycle keeps it until the collector comes round."""
    with emulated_gpu() as gpu:
        gc.collect()
        gc.disable()
        try:
            free = gpu.memory()[0]
            llm = LLM(tiny_folder, device="cuda", dtype="bfloat16", max_num_seqs=2, max_model_len=64)
            llm.generate("one", max_tokens=3, ignore_eos=True)
            assert gpu.memory()[0] < free - 100_000
            del llm
            gpu.synchronize()
            assert gpu.memory()[0] == free
        finally:
            gc.enable()


def recordings(llm, **params):
    """Steps recorded while sequences end one after the other, so that each number of them runs."""
    count, begin = [], llm.ops.begin_recording
    llm.ops.begin_recording = lambda: (count.append(1), begin())
    try:
        prompts = [{"prompt_token_ids": [5 + i]} for i in range(20)]
        each = [SamplingParams(max_tokens=3 + i, ignore_eos=True, detokenize=False, **params) for i in range(20)]
        llm.generate(prompts, each)
    finally:
        llm.ops.begin_recording = begin
    return len(count)


def test_a_load_of_any_number_of_sequences_records_each_step_once(tiny_folder):
    llm = LLM(tiny_folder, device="cpu", max_num_seqs=20, max_model_len=64)
    assert recordings(llm, temperature=0) == 20
    assert recordings(llm, temperature=0) == recordings(llm, temperature=1) == 0


def test_a_small_gpu_keeps_as_many_as_have_room_and_counts_them(tiny_folder, monkeypatch):
    with emulated_gpu(memory=1 << 30) as gpu:
        one = step_bytes(LLM(tiny_folder, device="cpu").spec, 4, 1)
        options = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 4, "max_model_len": 64}
        plans = []
        for kept in (1, 3):
            monkeypatch.setattr(cuda_limits, "RECORDED_SHARE", gpu.memory()[1] // (kept * one))
            llm = LLM(tiny_folder, **options)
            plans.append(llm.plan.workspace)
            prompts = [{"prompt_token_ids": [5 + i]} for i in range(4)]
            each = [
                SamplingParams(max_tokens=3 + i, temperature=0, ignore_eos=True, detokenize=False) for i in range(4)
            ]
            llm.generate(prompts, each)
            assert len(llm._runner._recorded) == kept
        assert plans[1] - plans[0] == 2 * one
