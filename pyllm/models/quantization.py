"""`quantization_config` of a config.json: how weights were quantized; raises `ConfigError` for what is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm.errors import ConfigError, listed, shown
from pyllm.models.config_reader import ConfigReader
from pyllm.quantization import Layout, Quantization, Scheme

KEY = "quantization_config"
METHODS = ("compressed-tensors", "gptq", "awq")
BITS = (4, 8)

# Keys that say how a quantizer came to its integers, or how some engine is to run them; not what they mean.
BOOKKEEPING = frozenset(
    """
    act_group_aware actorder backend batch_size block_name_to_quantize cache_block_outputs cache_examples_on_gpu
    damp_auto_increment damp_percent dataset desc_act disable_exllama do_fuse exllama_config failsafe fuse_max_seq_len
    global_compression_ratio hessian ignore lm_head max_input_length meta model_file_base_name model_name_or_path
    model_seqlen module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse
    modules_to_not_convert mse observer observer_kwargs offload_to_disk offload_to_disk_path pack_impl pad_token_id
    quant_method quantization_status scale_dtype static_groups tokenizer true_sequential use_cuda_fp16 use_exllama
    v2 version zp_dtype
    """.split()  # noqa: SIM905
)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What the config says about quantized weights; None for a model that is not quantized."""
    value = config.get(KEY)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {KEY}: expected an object, found {shown(value)}")
    reader = ConfigReader(value, "quantized", at=f"{KEY}.")
    method = value.get("quant_method")
    if method not in METHODS:
        raise ConfigError(f"config.json: {KEY}.quant_method: expected {', '.join(METHODS)}, found {shown(method)}")
    schemes = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}[method](reader)
    reader.check_unused(BOOKKEEPING)
    if reader.problems:
        raise ConfigError(listed(f"config.json: a {method} model of this kind is not supported", reader.problems))
    return Quantization(method, tuple(dict.fromkeys(schemes)))


def _compressed_tensors(reader: ConfigReader) -> list[Scheme]:
    formats = {layout.value: layout for layout in (Layout.PACK_QUANTIZED, Layout.INT_QUANTIZED)}
    several: dict[str, Layout | None] = {**formats, "mixed-precision": None}  # then each group has its own
    layout = reader.choice("format", options=several, default=Layout.PACK_QUANTIZED.value)
    reader.only("kv_cache_scheme", None)
    reader.only("sparsity_config", None, {})
    reader.only("transform_config", None, {})
    groups = reader.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        reader.refuse("config_groups", groups, "an object with one group or more")
        return []
    schemes = []
    for name, value in groups.items():
        if not isinstance(value, dict) or not isinstance(value.get("weights"), dict):
            reader.refuse(f"config_groups.{name}", value, "an object that says how weights are quantized")
            continue
        group = reader.nested(f"config_groups.{name}", value)
        group.get("targets")  # the stored tensors tell
        group.only("output_activations", None)
        _check_activations(group)
        own = group.choice("format", options=formats, default=(layout or Layout.PACK_QUANTIZED).value)
        schemes.append(_weights(group.nested("weights", group.get("weights")), own))
        group.check_unused()
    return schemes


def _weights(reader: ConfigReader, layout: Layout) -> Scheme:
    strategies = {name: name for name in ("group", "channel", "tensor")}
    default = "channel" if reader.get("group_size") in (None, -1) else "group"
    strategy = reader.choice("strategy", options=strategies, default=default)
    bits = _bits(reader, "num_bits", (8,) if layout is Layout.INT_QUANTIZED else BITS, default=8)
    reader.choice("type", options={"int": "int"}, default="int")
    reader.only("dynamic", False)
    reader.only("block_structure", None)
    group_size = 0
    if strategy == "group":
        group_size = reader.integer("group_size", default=0)
        if group_size == 0:
            reader.refuse("group_size", None, "a whole number, as the strategy is group")
    else:
        reader.only("group_size", None, -1, 0)
    symmetric = reader.boolean("symmetric", default=True)
    if strategy == "tensor" and layout is Layout.PACK_QUANTIZED and not symmetric:
        reader.refuse("symmetric", symmetric, "true where there is one scale for the whole tensor")
    reader.check_unused(BOOKKEEPING)
    return Scheme(layout, bits, group_size, symmetric, per_tensor=strategy == "tensor")


def _check_activations(group: ConfigReader) -> None:
    """Activations that were quantized on the fly need nothing from the checkpoint: ours are treated our own way."""
    value = group.get("input_activations")
    if value is None:
        return
    if not isinstance(value, dict):
        group.refuse("input_activations", value, "an object or null")
        return
    inner = group.nested("input_activations", value)
    inner.choice("type", options={"int": "int"}, default="int")
    inner.only("dynamic", True)


def _gptq(reader: ConfigReader) -> list[Scheme]:
    layouts = {layout.value: layout for layout in (Layout.GPTQ, Layout.GPTQ_V2)}
    layout = reader.choice("checkpoint_format", "format", options=layouts, default=Layout.GPTQ.value)
    reader.only("dynamic", None, {})
    reader.only("pack_dtype", None, "int32")
    reader.only("is_marlin_format", None, False)
    reader.only("adapter", None, {})
    reader.boolean("sym", default=True)  # zero points are stored either way
    return [Scheme(layout, _bits(reader, "bits", BITS, default=4), _group_size(reader))]


def _awq(reader: ConfigReader) -> list[Scheme]:
    version = reader.get("version", "format")
    if version is not None and str(version).lower() != "gemm":
        reader.refuse("version", version, "gemm")
    reader.only("zero_point", True)
    reader.boolean("sym", default=True)
    return [Scheme(Layout.AWQ, _bits(reader, "bits", (4,), default=4), _group_size(reader))]


def _bits(reader: ConfigReader, name: str, options: tuple[int, ...], default: int) -> int:
    value = reader.get(name)
    if value is not None and (isinstance(value, bool) or value not in options):
        reader.refuse(name, value, " or ".join(map(str, options)))
    return value if value in options else default


def _group_size(reader: ConfigReader) -> int:
    """-1 is one group for all inputs."""
    value = reader.get("group_size")
    return 0 if value == -1 and not isinstance(value, bool) else reader.integer("group_size", default=128)
