"""Whole models on the emulated GPU: the engine's steps, graphs and cache over the kernels of csrc/cuda."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from emulated_cuda import emulated_gpu
from encoder_folder import encoder_folder
from safetensors.numpy import save_file

from pyllm import LLM, StructuredOutputs
from pyllm.compare.shapes import stored_shapes
from pyllm.errors import InsufficientMemoryError, NonFiniteError
from pyllm.models import family_of

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
PROMPTS = ["Once upon a time there was a little girl", "The quick", "Grüße aus Köln"]


@pytest.fixture(scope="module")
def gpu():
    with emulated_gpu() as gpu:
        yield gpu


def ids(outputs):
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def pair(gpu, tiny_folder):
    """The same model on the GPU and on the CPU, in bfloat16."""
    return tuple(LLM(tiny_folder, device=device, dtype="bfloat16", **SMALL) for device in ("cuda", "cpu"))


@pytest.fixture(scope="module")
def exact(gpu, tiny_folder):
    """The same in float32."""
    return tuple(LLM(tiny_folder, device=device, dtype="float32", **SMALL) for device in ("cuda", "cpu"))


def launches(llm, prompts, **params):
    """Names of the kernels in the graph of the one decode step which these prompts have, in order."""
    recorded, real = [], llm.ops.kernels

    class Noting:
        def __getattr__(self, name):
            found = getattr(real, name)
            if not llm.ops.device.recording or name in ("Array", "skinny_fits"):
                return found
            return lambda *arguments: (recorded.append(name), found(*arguments))

    llm._runner._recorded.clear()
    llm.ops.kernels = Noting()
    try:
        llm.generate(prompts, max_tokens=3, detokenize=False, ignore_eos=True, **params)
    finally:
        llm.ops.kernels = real
    return recorded


FUSED = ["skinny_qkv", "split_attention", "skinny_matmul", "skinny_matmul", "skinny_matmul"]
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
ENCODER_DECODERS = {name for name in FAMILIES if name.startswith(("bart", "mbart", "mt5", "t5"))}
ENCODERS = {name for name in FAMILIES if name.startswith(("bert", "distilbert", "electra", "roberta"))}
ON_CPUS_ALONE = {"mpt-clipped"}
DECODERS = set(FAMILIES) - ENCODERS - ENCODER_DECODERS - ON_CPUS_ALONE


@pytest.mark.parametrize("name", sorted(ENCODERS | ENCODER_DECODERS))
def test_what_encodes_is_what_transformers_computes(gpu, name):
    llm = LLM(GOLDEN / name, device="cuda", dtype="float32", skip_tokenizer_init=True, max_num_seqs=2)
    with np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as expected:
        source, types = (expected[key].tolist() if key in expected else None for key in ("source", "types"))
        got = llm.forward(
            expected["ids"].tolist(), source_token_ids=source, token_type_ids=types, output_hidden_states=True
        )
        pairs = [(got.logits, expected["logits"]), *zip(got.hidden_states, expected["hidden_states"], strict=True)]
        if source is not None:
            pairs += zip(got.encoder_hidden_states, expected["encoder_states"], strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == np.float32 and np.abs(mine - theirs).max() < 5e-5 * max(1, np.abs(theirs).max())


SOURCES = [[7, 3, 40, 9, 22, 5, 8, 1], [11, 1], [*range(3, 60), 1]]


@pytest.mark.parametrize("name", sorted(ENCODER_DECODERS))
def test_encoder_decoders_write_what_the_cpu_writes(gpu, name):
    cpu, mine = (
        LLM(GOLDEN / name, device=device, dtype="float32", skip_tokenizer_init=True, max_num_seqs=6)
        for device in ("cpu", "cuda")
    )
    prompts, params = [{"prompt_token_ids": tokens} for tokens in SOURCES], {"detokenize": False, "temperature": 0}
    for more in ({"max_tokens": 6, "ignore_eos": True}, {"max_tokens": 3, "num_beams": 2, "n": 2}):
        assert ids(mine.generate(prompts, **params, **more)) == ids(cpu.generate(prompts, **params, **more))
    pairs = [{"prompt_token_ids": tokens, "target_token_ids": [5, 9, 31]} for tokens in SOURCES]
    for a, b in zip(mine.score(pairs), cpu.score(pairs), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48}
BART = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
CROSS = [*FUSED[:3], "skinny_matmul", "split_attention", "skinny_matmul", "skinny_matmul", "skinny_matmul"]
POST_CROSS = [*FUSED[:3], "norm", *CROSS[3:6], "norm", "skinny_matmul", "skinny_matmul", "norm"]


@pytest.mark.parametrize(
    ("name", "sizes", "step"),
    [
        ("t5-gated", T5, ["embedding", "gather_columns", *CROSS]),
        ("bart", BART, ["embedding", "norm", *POST_CROSS, *POST_CROSS]),
    ],
)
def test_encoder_decoders_run_on_the_kernels_of_tensor_cores(gpu, tmp_path, name, sizes, step):
    """The golden models have odd sizes, which others take. The error is at most twice that of the CPU in bfloat16."""
    config = {**json.loads((GOLDEN / name / "config.json").read_text()), **sizes, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rng, family = np.random.default_rng(0), family_of(config)
    save_file(
        {
            tensor: (rng.normal(size=shape) * 0.2 + (len(shape) == 1 and "norm" in tensor)).astype(np.float32)
            for tensor, shape in stored_shapes(family, family.read(config)).items()
        },
        tmp_path / "model.safetensors",
    )
    mine, cpu, exact = (
        LLM(tmp_path, device=device, dtype=dtype, skip_tokenizer_init=True)
        for device, dtype in (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32"))
    )
    for source in SOURCES:
        got, rounded, want = (llm.forward([2, 5, 9, 31], source_token_ids=source).logits for llm in (mine, cpu, exact))
        assert np.linalg.norm(got - want) <= 2 * np.linalg.norm(rounded - want)
    assert launches(mine, {"prompt_token_ids": SOURCES[0]}, temperature=0) == [*step, "skinny_argmax", "advance"]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_encoders_do_their_tasks_as_on_the_cpu(gpu, tmp_path, dtype, bound):
    texts = ["the [MASK] sat on the [MASK]", "a [MASK]"]

    def both(name):
        folder = encoder_folder(name, tmp_path / name)
        return [LLM(folder, device=device, dtype=dtype, max_num_seqs=3) for device in ("cuda", "cpu")]

    def by_token(mask):
        return [one.probability for one in sorted(mask, key=lambda one: one.token_id)]

    gpus, cpus = both("bert")
    assert gpus.plan.gpu == gpu.name
    for pooling in ("mean", "cls"):
        vectors = [llm.embed(texts, pooling=pooling, normalize=True) for llm in (gpus, cpus)]
        assert np.allclose(*vectors, atol=bound)
    found = [llm.fill_mask(texts, top_k=gpus.spec.vocab_size) for llm in (gpus, cpus)]
    assert np.allclose(*([by_token(mask) for text in masks for mask in text] for masks in found), atol=bound)
    found = [llm.classify([("the cat", "a dog"), "hat"]) for llm in both("bert-classifier")]
    assert np.allclose(*([list(text.scores.values()) for text in texts] for texts in found), atol=bound)
    found = [llm.detect_replaced(texts) for llm in both("electra-discriminator")]
    assert np.allclose(*([one.probability for text in texts for one in text] for texts in found), atol=bound)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_every_decoder_is_what_transformers_computes(gpu, name):
    llm = LLM(GOLDEN / name, device="cuda", dtype="float32", skip_tokenizer_init=True, max_num_seqs=2)
    with np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as expected:
        got, want = llm.forward(expected["ids"].tolist()).logits, expected["logits"]
    assert np.abs(got - want).max() < 5e-5 * max(1, np.abs(want).max())


SAME_DECODER = ("bloom-", "cohere-", "gpt2-", "llama-", "qwen2-")  # the kernels of a decode step are those of another


@pytest.mark.parametrize("name", sorted(n for n in DECODERS if not n.startswith(SAME_DECODER)))
def test_every_decoder_decodes_as_on_the_cpu_in_bfloat16(gpu, name):
    """By the fused kernels, where the model's spec has them."""
    params = {"max_tokens": 6, "temperature": 0, "detokenize": False, "ignore_eos": True}
    cpu, mine = (
        LLM(GOLDEN / name, device=device, dtype="bfloat16", skip_tokenizer_init=True) for device in ("cpu", "cuda")
    )
    blank = [cpu.spec.prefix.mask_ids[0][0], cpu.spec.prefix.start_id] if cpu.spec.fills_blanks else []
    prompts = [{"prompt_token_ids": [*ids, *blank]} for ids in ([3, 11, 7, 5, 2], [13], [40, 21, 9])]
    assert agreeing(cpu.generate(prompts, logprobs=2, **params), mine.generate(prompts, **params)) >= 4


MANY_ROWS = ["norm", "split_matmul", "qkv_write", "split_attention", "split_matmul", "norm", *["split_matmul"] * 2]


@pytest.mark.parametrize(
    ("name", "embedded", "layer"),
    [
        ("llama", ["embedding", "rope_angles"], FUSED),
        ("gpt2", ["embedding"], FUSED),
        ("gptj", ["embedding", "rope_angles"], ["norm", *FUSED]),  # which both parts of a block read
    ],
)
def test_a_decode_step_launches_the_fused_kernels(gpu, tiny_folder, name, embedded, layer):
    folder = tiny_folder if name == "llama" else GOLDEN / name
    llm = LLM(folder, device="cuda", dtype="bfloat16", skip_tokenizer_init=True, max_num_seqs=17)
    prompts, layers = [{"prompt_token_ids": [3, 11, 7]}, {"prompt_token_ids": [13]}], len(llm.spec.blocks)
    fused = [*embedded, *layer * layers]
    assert launches(llm, prompts, temperature=0) == [*fused, "skinny_argmax", "advance"]
    assert launches(llm, prompts, temperature=1, seed=1) == [*fused, "skinny_matmul", "sample", "advance"]
    if name == "gpt2":
        many = launches(llm, prompts[1:] * 17, temperature=0)
        assert many == [*embedded, *MANY_ROWS * layers, "norm", "split_matmul", "sample", "advance"]


def test_heads_that_are_normed_take_one_kernel_behind_their_product(gpu):
    llm = LLM(GOLDEN / "qwen3", device="cuda", dtype="bfloat16", skip_tokenizer_init=True)
    launched = launches(llm, {"prompt_token_ids": [3, 11, 7]}, temperature=0)
    assert launched[:4] == ["embedding", "rope_angles", "skinny_matmul", "qkv_write"] and "norm" not in launched


def test_the_largest_logit_is_found_without_logits_as_with_them(pair):
    params = dict(max_tokens=6, temperature=0)
    assert ids(pair[0].generate(PROMPTS, **params)) == ids(pair[0].generate(PROMPTS, logprobs=1, **params))


@pytest.mark.parametrize("name", ["chatglm", "glm2021"])
def test_models_that_count_twice_decode_as_on_the_cpu(gpu, name):
    with np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as expected:
        prompt = {"prompt_token_ids": expected["ids"].tolist()}
    cpu, mine = (
        LLM(GOLDEN / name, device=device, dtype="float32", skip_tokenizer_init=True).generate(
            prompt, max_tokens=24, temperature=0, detokenize=False, ignore_eos=True
        )
        for device in ("cpu", "cuda")
    )
    assert ids(mine) == ids(cpu)


def agreeing(cpu, gpu):
    """Number of tokens compared: each output's as far as the two best lie further apart than rounding moves them."""
    compared = 0
    for theirs, mine in zip(cpu, gpu, strict=True):
        theirs, mine = theirs.outputs[0], mine.outputs[0]
        for entry, want, got in zip(theirs.logprobs, theirs.token_ids, mine.token_ids, strict=True):
            best, second = sorted((value.logprob for value in entry.values()), reverse=True)[:2]
            if best - second < 0.05:
                break
            assert got == want
            compared += 1
    return compared


def test_what_runs_is_the_gpu(gpu, pair):
    assert (pair[0].device, pair[1].device, pair[0].plan.gpu) == ("cuda", "cpu", gpu.name)


def test_logits_are_the_cpus_within_rounding(pair, exact):
    """Two layers in bfloat16: each of the some ten roundings on the way of 2^-9 of a value."""
    tokens = list(range(5, 40))
    for (gpu, cpu), bound in ((pair, 1.5e-2), (exact, 1e-5)):
        mine = gpu.forward(tokens, output_hidden_states=True)
        theirs = cpu.forward(tokens, output_hidden_states=True)
        assert np.linalg.norm(mine.logits - theirs.logits) <= bound * np.linalg.norm(theirs.logits)
        for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
            assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


def test_greedy_tokens_are_the_cpus(pair, exact):
    gpu, cpu = (llm.generate(PROMPTS, max_tokens=12, temperature=0) for llm in exact)
    assert ids(gpu) == ids(cpu)
    gpu, cpu = (llm.generate(PROMPTS, max_tokens=12, temperature=0, logprobs=2) for llm in pair)
    assert agreeing(cpu, gpu) >= 12


def test_the_same_batch_gives_the_same_bits(pair):
    first, second = (pair[0].forward(list(range(7, 30))).logits for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_decoding_is_replayed_ahead_and_ends_where_it_should(exact, monkeypatch):
    gpu, cpu = exact
    replayed = []
    real = gpu.ops.replay
    monkeypatch.setattr(gpu.ops, "replay", lambda graph: (replayed.append(1), real(graph)))
    want = cpu.generate(PROMPTS[1], max_tokens=30, temperature=0)[0].outputs[0]
    got = gpu.generate(PROMPTS[1], max_tokens=30, temperature=0)[0].outputs[0]
    assert got.token_ids == want.token_ids
    assert len(replayed) == 29  # none in vain: how far a sequence goes on is known
    stop = want.token_ids[9]
    replayed.clear()
    got = gpu.generate(PROMPTS[1], max_tokens=30, temperature=0, stop_token_ids=[stop])[0].outputs[0]
    end = want.token_ids.index(stop)
    assert got.token_ids == want.token_ids[: end + 1] and end <= len(replayed) <= end + 8


def test_models_run_in_several_threads_at_once(gpu, tiny_folder, pair):
    """Each records its steps while the other runs its own."""
    llms = [LLM(tiny_folder, device="cuda", dtype="bfloat16", **SMALL) for _ in range(2)]
    params = dict(max_tokens=4, temperature=0)
    expected = [ids(pair[0].generate(prompt, **params)) for prompt in PROMPTS[1:]]
    with ThreadPoolExecutor(len(llms)) as pool:
        found = pool.map(lambda llm, prompt: llm.generate(prompt, **params), llms, PROMPTS[1:])
        assert [ids(outputs) for outputs in found] == expected


def test_draws_are_the_cpus(exact):
    params = dict(max_tokens=10, temperature=0.9, top_k=20, top_p=0.9, seed=3)
    assert ids(exact[0].generate(PROMPTS, **params)) == ids(exact[1].generate(PROMPTS, **params))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3, "presence_penalty": 0.2},
        {"logit_bias": {7: 5.0, 9: -3.0}, "min_tokens": 4},
        {"allowed_token_ids": [5, 6, 7, 8]},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"num_beams": 3, "n": 2},
    ],
    ids=lambda params: next(iter(params)),
)
def test_what_a_request_may_ask_is_what_the_cpu_gives(exact, params):
    gpu, cpu = (llm.generate(PROMPTS[:2], max_tokens=6, temperature=0, **params) for llm in exact)
    assert ids(gpu) == ids(cpu)
    for mine, theirs in zip(gpu, cpu, strict=True):
        for a, b in zip(mine.outputs, theirs.outputs, strict=True):
            if b.cumulative_logprob is not None:
                assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)


def test_structured_output(exact):
    pytest.importorskip("llguidance")
    choice = StructuredOutputs(choice=["one", "two"])
    assert exact[0].generate("x", max_tokens=8, structured_outputs=choice)[0].outputs[0].text in ("one", "two")


def test_drafts_embeddings_and_scores(gpu, tiny_folder, exact):
    drafted = LLM(tiny_folder, device="cuda", dtype="float32", speculative="ngram", **SMALL)
    text = "one two one two one two one"
    assert ids(drafted.generate(text, max_tokens=8, temperature=0)) == ids(
        exact[1].generate(text, max_tokens=8, temperature=0)
    )
    vectors = [llm.embed(PROMPTS, pooling="mean") for llm in exact]
    assert np.allclose(*vectors, atol=1e-4)
    scores = [llm.score(PROMPTS) for llm in exact]
    for a, b in zip(*scores, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_a_draft_model_has_a_cache_that_its_own_heads_take(gpu):
    """Its heads have 12 channels, which the kernels of a bfloat16 cache do not take."""
    models = {"draft_model": GOLDEN / "qwen3", "dtype": "bfloat16", "skip_tokenizer_init": True}
    drafted = LLM(GOLDEN / "llama", device="cuda", **models)
    assert (drafted.plan.cache_dtype, drafted.plan.draft_model.cache_dtype) == ("bfloat16", "float32")
    prompt, params = {"prompt_token_ids": [3, 5, 7]}, {"max_tokens": 6, "detokenize": False, "ignore_eos": True}
    plain = LLM(GOLDEN / "llama", device="cuda", dtype="bfloat16", skip_tokenizer_init=True)
    assert ids(drafted.generate(prompt, temperature=0, **params)) == ids(
        plain.generate(prompt, temperature=0, **params)
    )


def test_a_bidirectional_prefix_sees_all_of_itself(gpu, tiny_folder):
    mine, theirs = (LLM(tiny_folder, device=name, dtype="float32", prefix=True, **SMALL) for name in ("cuda", "cpu"))
    tokens = list(range(5, 40))
    for prefix in (0, 20, None):
        got, want = (llm.forward(tokens, prefix=prefix).logits for llm in (mine, theirs))
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    assert ids(mine.generate(PROMPTS, max_tokens=6, temperature=0)) == ids(
        theirs.generate(PROMPTS, max_tokens=6, temperature=0)
    )


def test_a_batch_invariant_engine_gives_a_sequence_the_same_bits_in_any_batch(gpu, tiny_folder):
    llm = LLM(tiny_folder, device="cuda", dtype="bfloat16", batch_invariant=True, **SMALL)
    params = dict(max_tokens=5, temperature=0, logprobs=1)
    together = llm.generate(PROMPTS, **params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        [alone] = llm.generate(prompt, **params)
        assert alone.outputs[0].logprobs == output.outputs[0].logprobs


def test_auto_takes_the_gpu_unless_it_cannot_do_what_is_asked(gpu, tiny_folder):
    assert LLM(tiny_folder, device="auto", **SMALL).device == "cuda"
    assert LLM(tiny_folder, device="auto", quantization="int8", **SMALL).device == "cpu"
    for wrong in ({"quantization": "int8"}, {"dtype": "float16"}, {"kv_cache_dtype": "int8"}):
        with pytest.raises(ValueError, match=r"expected .* on a GPU.*, got .* use device='cpu'"):
            LLM(tiny_folder, device="cuda", **wrong)


def test_a_model_that_runs_on_cpus_alone_says_so(gpu):
    for name in ON_CPUS_ALONE:
        with pytest.raises(ValueError, match=r"clip_qkv: expected null for a model on a GPU.* use device='cpu'"):
            LLM(GOLDEN / name, device="cuda", skip_tokenizer_init=True)
        assert LLM(GOLDEN / name, device="auto", skip_tokenizer_init=True).device == "cpu"


def test_a_model_that_does_not_fit_the_gpu_says_so(tiny_folder):
    with (
        emulated_gpu(memory=1 << 20),
        pytest.raises(InsufficientMemoryError, match=r"not enough memory on Emulated GPU: needed .* free"),
    ):
        LLM(tiny_folder, device="cuda")


def test_weights_that_are_no_numbers_are_named(gpu, tmp_path):
    folder = tiny_model.make(tmp_path / "bad", poison="model.layers.1.mlp.up_proj.weight")
    llm = LLM(folder, device="cuda", **SMALL)
    with pytest.raises(NonFiniteError, match="from layer 1 on"):
        llm.generate("Once", max_tokens=2)
