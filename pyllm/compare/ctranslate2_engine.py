"""CTranslate2, from its own conversion of the same weights; tokens stand there under made-up names."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models

from pyllm.compare.engine import Decoded, Settings, Unsupported
from pyllm.system import available_memory


class CTranslate2:
    """A generator, which runs whole requests: decoding begins behind the prompts each time.

    The prompt of a single sequence, but for its last token, is kept as what CTranslate2 calls a static prompt.
    """

    weight_bytes: int | None = None
    cache_value_bytes = 4.0

    def __init__(self, model: Path, settings: Settings) -> None:
        self.heads = json.loads((model / "heads.json").read_text())
        self.generator = ctranslate2.Generator(
            str(model), compute_type=settings.dtype, intra_threads=settings.threads, inter_threads=1
        )
        self.prompts: list[list[str]] = []

    @staticmethod
    def prepare(folder: Path, dtype: str) -> Path:
        """Its conversion, in a folder beside the one given."""
        known = ctranslate2.get_supported_compute_types("cpu")
        if dtype not in known:
            raise Unsupported(f"CTranslate2 has no {dtype} on this CPU")
        target = converted(folder, dtype)
        config = json.loads((folder / "config.json").read_text())
        (target / "heads.json").write_text(json.dumps(config.get("num_attention_heads") or config["n_head"]))
        return target

    def reserve(self, sequences: int, length: int) -> None:
        """Nothing is kept between requests; prompts whose attention scores do not fit memory are refused."""
        scores = 4 * sequences * self.heads * length * length
        if scores > available_memory() // 2:
            raise Unsupported(
                f"its attention over {length} tokens at once takes {scores / 1e9:.1f} GB of scores, more than is free"
            )

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Run prompts from nothing; the next token of each."""
        self.prompts = [[f"t{i}" for i in ids] for ids in prompts]
        return [row[0] for row in self._run(self.prompts, 1, None)[1]]

    def decode(self, steps: int) -> Decoded:
        """Generate from the prompts again, timed behind the first token."""
        alone = len(self.prompts) == 1 and len(self.prompts[0]) > 1
        prompts = [self.prompts[0][-1:]] if alone else self.prompts
        times, tokens = self._run(prompts, steps + 1, self.prompts[0][:-1] if alone else None)
        return Decoded(times[-1] - times[0], [row[1:] for row in tokens])

    def _run(
        self, prompts: list[list[str]], count: int, static: list[str] | None
    ) -> tuple[list[float], list[list[int]]]:
        """When each of `count` steps was done, and the tokens of each sequence."""
        done = [0.0] * count

        def note(result: ctranslate2.GenerationStepResult) -> bool:
            done[result.step] = time.perf_counter()
            return False

        results = self.generator.generate_batch(
            prompts,
            static_prompt=static,
            cache_static_prompt=True,
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            end_token=[],
            callback=note,
        )
        tokens = [list(result.sequences_ids[0]) for result in results]
        if any(len(row) != count for row in tokens):
            raise RuntimeError(f"expected {count} tokens of each sequence, got {[len(row) for row in tokens]}")
        return done, tokens


def converted(folder: Path, dtype: str) -> Path:
    """The conversion of the model in `folder`, beside it; made where it is not there yet."""
    target = folder.with_name(f"{folder.name}.ctranslate2-{dtype}")
    if target.exists():
        return target
    named = folder.with_name(f"{folder.name}.named")
    _with_tokenizer(folder, named, json.loads((folder / "config.json").read_text())["vocab_size"])
    part = Path(f"{target}.part")
    TransformersConverter(str(named), low_cpu_mem_usage=True).convert(str(part), quantization=dtype, force=True)
    shutil.rmtree(named)
    part.rename(target)
    return target


def _with_tokenizer(folder: Path, named: Path, vocabulary: int) -> None:
    """The model in `folder` again as `named`, by links, with a tokenizer whose tokens are called t0, t1, ..."""
    named.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (named / file).unlink(missing_ok=True)
        (named / file).symlink_to((folder / file).resolve())
    names = {f"t{i}": i for i in range(vocabulary)}
    Tokenizer(models.WordLevel(names, unk_token="t0")).save(str(named / "tokenizer.json"))
    special = {f"{kind}_token": "t0" for kind in ("bos", "eos", "unk", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (named / "tokenizer_config.json").write_text(json.dumps(settings))
