"""NVIDIA Model Optimizer as the calibrator: factors, magnitudes, largest values and choices of formats are its own.

Only here is it imported, and only in the optimiser's process: the import takes 7 s and half a gigabyte. Configurations
of 0.47 are ordered lists in which the last match wins, and what nothing matches stays at an *enabled* default, hence
the first entry of `configuration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from optimize.plan import Plan
from optimize.ptq.assemble import Calibrated
from optimize.ptq.network import Batches, Report, column_moments
from optimize.recipe import LayerFormat, Recipe

_BITS: dict[str, Any] = {"int4": 4, "int8": 8, "fp8": (4, 3)}
AWQ_ALPHA_STEP = 0.1
PASSES = {"awq": 3, "auto": 3, "smoothquant": 1}
"""How often a method runs the text through the network: AWQ for our moments, for its statistics and for its search."""


def weight_attributes(form: LayerFormat) -> dict[str, Any]:
    """The library's quantiser of a weight in this format."""
    if form.group_size is None:
        return {"num_bits": _BITS[form.weights], "axis": 0}
    return {"num_bits": _BITS[form.weights], "block_sizes": {-1: form.group_size, "type": "static"}}


def find_amax(weight: Tensor, form: LayerFormat) -> Tensor:
    """What its max calibrator finds in W [O, K]: [O], or [O, K / group_size], float32. See `convert.Amax`."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**weight_attributes(form)))
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    groups = 1 if form.group_size is None else weight.shape[1] // form.group_size
    amax: Tensor = quantizer.amax.float().reshape(weight.shape[0], groups)
    return amax.squeeze(1) if form.group_size is None else amax


def configuration(layers: Mapping[str, LayerFormat], algorithm: Any, *, inputs: bool = False) -> dict[str, Any]:
    """A configuration that quantises exactly these layers' weights; `inputs`: int8 activations as well."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, form in layers.items():
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight_attributes(form)})
        if inputs:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": 8, "axis": None}})
    return {"quant_cfg": entries, "algorithm": algorithm}


def calibrate(network: Any, recipe: Recipe, plan: Plan, batches: Batches) -> Calibrated:
    """Factors or magnitudes of the plan's layers. The network is not to be used any more: its weights have changed."""
    forms = plan.layers
    if recipe.method == "smoothquant":
        layers = {n: f for n, f in forms.items() if (f.weights, f.activations) == ("int8", "int8")}
        config = configuration(layers, {"method": "smoothquant", "alpha": 0.5}, inputs=True)
        mtq.quantize(network, config, batches.run)
        found = {n: network.get_submodule(n).input_quantizer._amax_for_smoothing.float().flatten() for n in layers}
        return Calibrated(magnitudes=found)
    layers = {n: f for n, f in forms.items() if f.weights == "int4" and n != "lm_head"}
    if not layers:
        return Calibrated()
    moments = column_moments(network, layers, batches)
    mtq.quantize(network, configuration(layers, {"method": "awq_lite", "alpha_step": AWQ_ALPHA_STEP}), batches.run)
    factors = {}
    for name in layers:
        found_here = getattr(network.get_submodule(name).input_quantizer, "_pre_quant_scale", None)
        if found_here is not None:
            factors[name] = found_here.float().flatten().cpu()
    return Calibrated(factors=factors, moments={name: found.cpu() for name, found in moments.items()})


def choose(network: Any, recipe: Recipe, plan: Plan, batches: Batches, report: Report) -> dict[str, int]:
    """Which of `recipe.auto.candidates` each layer gets, by name; layers that are better left alone are missing."""
    auto = recipe.auto
    forms = [_candidate(form) for form in auto.candidates]
    done = 0

    def step(model: Any, batch: dict[str, Tensor]) -> Any:
        nonlocal done
        done += 1
        report("scoring layers", done / (len(auto.candidates) * len(loader) + min(auto.score_steps, len(loader))))
        device = model.get_input_embeddings().weight.device
        output = model(input_ids=batch["input_ids"].to(device), use_cache=False)
        return output.logits if auto.search == "kl_div" else output

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = output.logits[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten().to(logits.device))

    loader = list(batches.halves())
    excluded = [f"*{name}*" for name in plan.kept]
    constraints = {"effective_bits": auto.bits, "cost": {"excluded_module_name_patterns": ["*lm_head*", *excluded]}}
    mtq.auto_quantize(
        network,
        constraints=constraints,
        quantization_formats=forms,
        data_loader=loader,
        forward_step=step,
        loss_func=loss if auto.search == "gradient" else None,
        disabled_layers=["*lm_head*", *excluded],
        num_calib_steps=len(loader),
        num_score_steps=min(auto.score_steps, len(loader)),
        method=auto.search,
    )
    return _chosen(network, auto.candidates, plan)


def _candidate(form: LayerFormat) -> dict[str, Any]:
    """The search tries a format on one layer at a time, whose quantisers then have no path before their names."""
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight_attributes(form)},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
    ]
    return {"quant_cfg": entries, "algorithm": "max"}


def _chosen(network: Any, candidates: tuple[LayerFormat, ...], plan: Plan) -> dict[str, int]:
    """Read off the quantisers that the search left enabled."""
    found: dict[str, int] = {}
    for name in plan.layers:
        quantizer = getattr(network.get_submodule(name), "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        for index, candidate in enumerate(candidates):
            blocks = (quantizer.block_sizes or {}).get(-1)
            if quantizer.num_bits == _BITS[candidate.weights] and blocks == candidate.group_size:
                found[name] = index
    return found


def versions() -> dict[str, str]:
    """Of what had a say in the result."""
    import modelopt
    import transformers

    return {"modelopt": modelopt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
