"""Whole models on a GPU: the cases of the emulated one, and the model of the package; skipped where there is none."""

from __future__ import annotations

import pytest
from test_cuda_models import (  # noqa: F401
    agreeing,
    exact,
    ids,
    pair,
    test_a_batch_invariant_engine_gives_a_sequence_the_same_bits_in_any_batch,
    test_a_bidirectional_prefix_sees_all_of_itself,
    test_a_decode_step_launches_the_fused_kernels,
    test_a_draft_model_has_a_cache_that_its_own_heads_take,
    test_auto_takes_the_gpu_unless_it_cannot_do_what_is_asked,
    test_decoding_is_replayed_ahead_and_ends_where_it_should,
    test_drafts_embeddings_and_scores,
    test_draws_are_the_cpus,
    test_encoder_decoders_run_on_the_kernels_of_tensor_cores,
    test_encoder_decoders_write_what_the_cpu_writes,
    test_encoders_do_their_tasks_as_on_the_cpu,
    test_every_decoder_decodes_as_on_the_cpu_in_bfloat16,
    test_every_decoder_is_what_transformers_computes,
    test_greedy_tokens_are_the_cpus,
    test_heads_that_are_normed_take_one_kernel_behind_their_product,
    test_logits_are_the_cpus_within_rounding,
    test_models_run_in_several_threads_at_once,
    test_models_that_count_twice_decode_as_on_the_cpu,
    test_structured_output,
    test_the_largest_logit_is_found_without_logits_as_with_them,
    test_the_same_batch_gives_the_same_bits,
    test_weights_that_are_no_numbers_are_named,
    test_what_a_request_may_ask_is_what_the_cpu_gives,
    test_what_encodes_is_what_transformers_computes,
    test_what_runs_is_the_gpu,
)

from pyllm import LLM, device
from pyllm.default_model import default_model

MISSING = device.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no GPU to run on: {MISSING}")]
STORY = [
    "Once upon a time, there was a shy boy named Finn. He had a yellow scooter and took it everywhere.",
    "There once was a merry girl named Lily who lived in a hollow tree. Lily had a seed and wanted to grow a tulip.",
    "Long ago, a quiet boy named Leo lived in a snug little hut. Leo's best friend was a lamb named Ivy.",
]


@pytest.fixture(scope="module")
def gpu():
    return device.open_device()


def test_the_packages_model_tells_the_cpus_story():
    outputs = [
        LLM(default_model(), device=name, dtype="bfloat16").generate(STORY, max_tokens=48, temperature=0, logprobs=2)
        for name in ("cpu", "cuda")
    ]
    assert agreeing(*outputs) >= 20


def test_decoding_gives_the_same_bits_three_times():
    """Of a prompt of several blocks too; what is in the cache already would be computed by other kernels."""
    llm = LLM(default_model(), device="cuda", dtype="bfloat16", enable_prefix_caching=False)
    prompts = [*STORY, " ".join(STORY * 2)]
    runs = [llm.generate(prompts, max_tokens=48, temperature=0.8, seed=1) for _ in range(3)]
    assert ids(runs[0]) == ids(runs[1]) == ids(runs[2])
