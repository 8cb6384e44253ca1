"""What the projects that publish EAGLE heads write into `config.json`, brought into one form.

    EAGLE       a Llama config; `draft_vocab_size` in those of EAGLE-3 only (eagle/train, eagle/traineagle3)
    SpecForge   architecture LlamaForCausalLMEagle3, layers under `eagle_config` (configs/*-eagle3.json)
    modelopt    the same (modelopt/torch/export/plugins/hf_spec_export.py)
    speculators `speculators_model_type`, the layer's shape under `transformer_layer_config` (speculators/models)
    vLLM        its own conversions: architecture EAGLEModel, the shape under `model` (transformers_utils/configs/eagle)
    Outpace     as SpecForge, and `feature_layers`; quantised layers as server/quant/checkpoint.py says

What would change a head's output and is not computed here is refused by name.
"""

from __future__ import annotations

from typing import Any

from server.models.config import UnsupportedModelError
from server.quant.checkpoint import QUANT_METHOD

_ONE_LAYER: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1,),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "logit_scale": (1, 1.0),
    "quantization_config": (None,),
    # norms that EAGLE-3 has not: of speculators, EAGLE-3.1 and HASS
    "norm_before_fc": (False,),
    "fc_norm": (False,),
    "norm_output": (False,),
    "layernorms": (False,),
    "add_para_norm": (False,),
}
_EAGLE_CONFIG: dict[str, tuple[Any, ...]] = {  # modelopt's switches
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "parallel_draft_step": (1,),
}
"""Settings with the values that are computed here, the first of which is also meant where a setting is not given."""
_OF_EAGLE3 = ("draft_vocab_size", "eagle_config", "eagle_aux_hidden_state_layer_ids", "feature_layers")


def flatten(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of a head in one dictionary, without those of another dialect around them.

    UnsupportedModelError: not an EAGLE head, or one of speculators that does not say where its residual starts (its
    own default and vLLM's differ).
    """
    inner = raw.get("transformer_layer_config")
    kind = raw.get("speculators_model_type")
    if kind is not None:
        if kind not in ("eagle", "eagle3"):
            raise UnsupportedModelError(f"speculators head of type {kind!r}: only 'eagle' and 'eagle3' are supported")
        if kind == "eagle3" and "norm_before_residual" not in raw:
            raise UnsupportedModelError("EAGLE-3 head of speculators whose config.json lacks norm_before_residual")
        if not isinstance(inner, dict):
            raise UnsupportedModelError("speculators head whose config.json lacks transformer_layer_config")
    elif raw.get("model_type") == "eagle" and isinstance(raw.get("model"), dict):
        inner = raw["model"]
    if not isinstance(inner, dict):
        return raw
    # What stands outside is the head's; a layer's own `architectures` and `model_type` say nothing of heads.
    outer = {k: v for k, v in raw.items() if k not in ("transformer_layer_config", "model")}
    names = {"architectures": raw.get("architectures") or [], "model_type": raw.get("model_type")}
    return {**inner, **outer, **names}


def version_of(settings: dict[str, Any]) -> int:
    """1 or 3, of `flatten`'s result. UnsupportedModelError: not an EAGLE head."""
    if kind := settings.get("speculators_model_type"):
        return 3 if kind == "eagle3" else 1
    names = [str(name) for name in settings.get("architectures") or []]
    joined = " ".join(names).lower()
    if "eagle3" in joined:
        return 3
    if "eagle" in joined or settings.get("model_type") == "eagle":
        return 1
    if names and not names[0].endswith("ForCausalLM"):
        raise UnsupportedModelError(f"{names[0]} is not an EAGLE head: EAGLE-1 and EAGLE-3 are supported")
    return 3 if any(settings.get(name) is not None for name in _OF_EAGLE3) else 1


def check_supported(settings: dict[str, Any], version: int) -> None:
    """UnsupportedModelError: the first setting that asks for what is not computed here."""
    nested = settings.get("eagle_config") or {}
    for prefix, values, allowed in (("", settings, _ONE_LAYER), ("eagle_config.", nested, _EAGLE_CONFIG)):
        for name, supported in allowed.items():
            value = values.get(name)
            if name == "sliding_window" and settings.get("use_sliding_window") is False:
                continue
            if name == "quantization_config" and isinstance(value, dict) and value.get("quant_method") == QUANT_METHOD:
                continue
            if value is None or value in supported or (value == [] and supported[0] is False):
                continue
            raise UnsupportedModelError(
                f"EAGLE-{version} head with {prefix}{name}={value!r}: only {supported[0]!r} is supported"
            )
    truncated = settings.get("truncated_vocab_size")
    if truncated is not None and truncated != settings.get("vocab_size"):
        raise UnsupportedModelError(f"EAGLE-{version} head with truncated_vocab_size={truncated!r}: use one without it")


def number(settings: dict[str, Any], name: str) -> int:
    """A setting that has to be there. UnsupportedModelError: it is not, or is no number."""
    try:
        return int(settings[name])
    except (KeyError, TypeError, ValueError):
        raise UnsupportedModelError(f"head whose config.json lacks the number {name}") from None


def feature_layers(settings: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """The target layers, 0-based, whose *outputs* an EAGLE-3 head fuses, for a target of `num_layers`.

    Two conventions are published, one apart:

    - Inputs. EAGLE keeps the stream before layers 2, n // 2 and n - 3 (eagle/model/modeling_llama_kv.py), which is also
      the default where nothing is said. vLLM does the same with a top-level `eagle_aux_hidden_state_layer_ids`
      (models/llama.py, `if idx in self.aux_hidden_state_layers` before the layer), the field of speculators.
    - Outputs. SpecForge and modelopt train on the outputs that they name under `eagle_config` (modelopt's
      `_collect_aux_hidden_states_forward_hook`; SGLang, which counts inputs, adds one when it reads them,
      `layers_to_capture = [val + 1 for val in layer_ids]`).

    A top-level (1, n // 2 - 1, n - 4) is the latter projects' default: a converter has lifted it out of
    `eagle_config` as it was (speculators' eagle3 converter passes ids through), so it is outputs too. Nobody trains on
    the inputs of those layers.
    """
    n = num_layers
    outputs = settings.get("feature_layers") or (settings.get("eagle_config") or {}).get(
        "eagle_aux_hidden_state_layer_ids"
    )
    inputs = settings.get("eagle_aux_hidden_state_layer_ids") or (2, n // 2, n - 3)
    if not outputs and tuple(inputs) == (1, n // 2 - 1, n - 4):
        outputs = inputs
    return tuple(int(i) for i in outputs) if outputs else tuple(int(i) - 1 for i in inputs)
