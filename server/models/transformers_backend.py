"""Decoder-only networks of `transformers` on our paged attention: one file, nothing per model.

A step's N tokens run as one sequence [1, N] with explicit positions and no cache of transformers' own. Every attention
layer ends in the function registered here, which finds the step's pools in a context variable, writes keys and values,
and attends over the pool. No mask function is registered for this name, so transformers builds no masks.

Whether a model keeps all its state in keys and values can not be read off its configuration, so each one proves it
when it is loaded: a dozen tokens in two chunks over a paged pool must give transformers' own eager logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from server.models.attention import AttentionBatch, paged_attention, write_kv
from server.models.base import KVLayer, TargetModel
from server.models.config import UnsupportedModelError, architecture_of, check_rope_length, eos_ids
from server.models.paging import make_pools
from server.quant.dense import MIN_PACKED_ROWS, packing_available
from server.quant.modules import pack_linears

ATTENTION = "outpace_paged"
PROBE_CHUNKS = (4, 8)
"""The tokens of the check at load: the first chunk fills the pool, the second must find them there."""
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class _Call:
    """One attention layer's inputs: query [N, heads, D], key and value [N, kv_heads, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class _Context(Protocol):
    def attend(self, module: nn.Module, call: _Call) -> Tensor:
        """[N, heads * D]"""


@dataclass(slots=True)
class _Step:
    """Attends over the pools of one step."""

    attn: AttentionBatch
    pools: list[Tensor]
    layers: dict[nn.Module, int]

    def attend(self, module: nn.Module, call: _Call) -> Tensor:
        pool = self.pools[self.layers[module]]
        write_kv(pool, self.attn.slot_mapping, torch.cat((call.key, call.value), dim=1).to(pool.dtype))
        return paged_attention(
            call.query.to(pool.dtype),
            pool,
            self.attn,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
        ).to(call.query.dtype)


@dataclass(slots=True)
class _Recorder:
    """Notes which modules attend, in order, and the shape of their keys and values."""

    layers: dict[nn.Module, KVLayer] = field(default_factory=dict)

    def attend(self, module: nn.Module, call: _Call) -> Tensor:
        num_tokens, kv_heads, dim = call.key.shape
        if module in self.layers:
            raise UnsupportedModelError("one attention layer is used at several depths, or attends twice")
        if {call.query.shape[-1], call.value.shape[-1]} != {dim}:
            raise UnsupportedModelError(f"keys are {dim} wide and values {call.value.shape[-1]}")
        self.layers[module] = KVLayer(kv_heads, dim)
        return torch.zeros_like(call.query).reshape(num_tokens, -1)


_context: ContextVar[_Context] = ContextVar("outpace_attention")


@contextmanager
def _attending(context: _Context) -> Iterator[None]:
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends; query [1, heads, N, D], key and value [1, kv_heads, N, D] -> ([1, N, heads, D], no weights)."""
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"its attention needs {name!r}")
    if attention_mask is not None:
        raise UnsupportedModelError("it builds attention masks of its own")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = _context.get().attend(module, _Call(q, k, v, scale, sliding_window, softcap, s_aux))
    return mixed.view(1, query.shape[2], query.shape[1], -1), None


AttentionInterface.register(ATTENTION, _attention)


class TransformersModel:
    """A causal language model of transformers. Implements server.models.base.TargetModel.

    On torch's `meta` device it has shapes and no memory: nothing can be proved there.
    """

    def __init__(self, net: Any, raw: dict[str, Any], max_positions: int) -> None:
        text = net.config.get_text_config()
        self._net = net
        self.architecture = architecture_of(raw)
        self.max_position_embeddings = int(getattr(text, "max_position_embeddings", None) or max_positions)
        self.eos_token_ids = eos_ids(raw) or eos_ids(text.to_dict())
        self.num_parameters = sum(p.numel() for p in net.parameters())
        parameter = next(net.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        if self.device.type == "meta":
            self._sketch(text)
            return
        probe = self._probe_tokens(int(text.vocab_size))
        with torch.inference_mode():
            expected = net(input_ids=probe, use_cache=False).logits[0]
            net.set_attn_implementation(ATTENTION)
            packed = self.device.type == "cpu" and self.dtype == torch.float32 and packing_available()
            if packed:
                pack_linears(net)
            self.vocab_size = int(expected.shape[-1])
            self.linear_path = "onednn-packed" if packed else "torch"
            self.min_rows = MIN_PACKED_ROWS if packed else 1
            self._record(probe[0])
            self._prove(probe[0], expected)

    def _record(self, token_ids: Tensor) -> Tensor:
        """Runs `token_ids` [N] to see which modules attend -> logits [1, V] of the first."""
        recorder = _Recorder()
        with _attending(recorder):
            positions = torch.arange(len(token_ids), device=self.device)
            logits = self._run(token_ids, positions, torch.tensor([0]))
        self.kv_layers = list(recorder.layers.values())
        self._layers = {module: i for i, module in enumerate(recorder.layers)}
        self._decoder_layers = _decoder_layers(self._net, list(recorder.layers))
        return logits

    def _sketch(self, text: Any) -> None:
        """What is known without values. A mixture of experts can not route then: its configuration is taken at its
        word."""
        self.linear_path, self.min_rows = "torch", 1
        pack_linears(self._net)  # into layers of ours, whose weights `as_on` knows to be copies
        self._net.set_attn_implementation(ATTENTION)
        try:
            with torch.inference_mode():
                logits = self._record(torch.zeros(sum(PROBE_CHUNKS), dtype=torch.int64, device=self.device))
            self.vocab_size = int(logits.shape[-1])
        except RuntimeError:  # values were asked for
            self.vocab_size = int(text.vocab_size)
            heads = int(text.num_attention_heads)
            kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
            head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
            self.kv_layers = [KVLayer(kv_heads, head_dim)] * int(text.num_hidden_layers)

    @property
    def net(self) -> Any:
        """The network itself, for those that run it without pages: they set an attention of their own."""
        return self._net

    def forward(
        self,
        token_ids: Tensor,
        pools: list[Tensor],
        attn: AttentionBatch,
        logits_at: Tensor,
        feature_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """See TargetModel.forward."""
        features: list[Tensor] = []
        hooks = [self._decoder_layers[i].register_forward_hook(_keep_output(features)) for i in sorted(feature_layers)]
        try:
            with _attending(_Step(attn, pools, self._layers)):
                logits = self._run(token_ids, attn.positions, logits_at)
        finally:
            for hook in hooks:
                hook.remove()
        return logits.float(), torch.cat(features, dim=-1) if features else None

    def _run(self, token_ids: Tensor, positions: Tensor, logits_at: Tensor) -> Tensor:
        logits: Tensor = self._net(
            input_ids=token_ids.unsqueeze(0),
            # Masked drafts of padded rows may lie past the context, where learned position tables end.
            position_ids=positions.clamp(max=self.max_position_embeddings - 1).unsqueeze(0),
            use_cache=False,
            logits_to_keep=logits_at,
        ).logits[0]
        return logits

    def _probe_tokens(self, vocab_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (1, sum(PROBE_CHUNKS)), generator=generator).to(self.device)

    def _prove(self, token_ids: Tensor, expected: Tensor) -> None:
        """Raises UnsupportedModelError unless the paged second chunk gives the eager logits `expected` [N, V]."""
        places = torch.arange(sum(PROBE_CHUNKS), device=self.device)
        pools = make_pools(self.kv_layers, len(places), self.dtype, self.device)
        parts = []
        for at in places.split(PROBE_CHUNKS):
            attn = AttentionBatch(at, at, gather=places.unsqueeze(0), width=len(at))
            parts.append(self.forward(token_ids[at], pools, attn, torch.arange(len(at), device=self.device))[0])
        logits = parts[-1]
        wanted = expected[PROBE_CHUNKS[0] :].float()
        errors = (logits - wanted).abs().amax(dim=-1) / wanted.abs().amax().clamp_min(1e-6)
        # Low precision makes a mixture of experts route a token differently now and then, hence the median there.
        error, bound = (errors.amax(), 1e-3) if self.dtype == torch.float32 else (errors.median(), 0.1)
        if not error <= bound:
            raise UnsupportedModelError(
                f"{self.architecture} does not compute the same on a paged KV pool (logits off by {float(error):.1%}): "
                "it keeps state outside of keys and values, or its attention is not plain causal attention"
            )


def _keep_output(features: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        features.append(hidden.squeeze(0))

    return hook


def _decoder_layers(net: nn.Module, attention: list[nn.Module]) -> list[nn.Module]:
    """The modules of the layer list in which element i holds the i-th attention module."""
    for candidate in net.modules():
        if not isinstance(candidate, nn.ModuleList) or len(candidate) != len(attention):
            continue
        pairs = zip(candidate, attention, strict=True)
        if all(any(module is inner for inner in layer.modules()) for layer, module in pairs):
            return list(candidate)
    raise UnsupportedModelError("its layers do not each hold one attention module")


def _model_class(raw: dict[str, Any]) -> Any:
    name = architecture_of(raw)
    if raw.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    return getattr(transformers, name, None) if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def supports(raw: dict[str, Any]) -> bool:
    """Whether the installed transformers has this architecture as a decoder whose attention can be replaced.

    A cheap look before loading; what remains is checked on the loaded network.
    """
    cls = _model_class(raw)
    if cls is None or raw.get("is_encoder_decoder") or getattr(cls, "_is_stateful", False):
        return False
    if not hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return False
    text = raw.get("text_config") or raw
    if not set(text.get("layer_types") or ()) <= set(LAYER_TYPES):
        return False
    return {"position_ids", "logits_to_keep"} <= set(inspect.signature(cls.forward).parameters)


def load_transformers_model(
    directory: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype, max_positions: int
) -> TargetModel:
    """Loads the network of a Hugging Face directory and proves it on paged attention; never runs code found there.

    On torch's `meta` device the directory is not read.

    Raises UnsupportedModelError, or WeightsError for missing tensors.
    """
    from server.models.loader import WeightsError  # the loader imports this module

    check_rope_length(raw, max_positions)
    if device.type == "meta":
        with device:
            net = AutoModelForCausalLM.from_config(_config_of(raw), dtype=dtype, attn_implementation="eager")
        return _served(net, raw, max_positions)
    try:
        net, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as e:
        raise WeightsError(f"{directory}: {e}") from e
    if info["missing_keys"]:
        raise WeightsError(
            f"{directory}: tensors missing from the checkpoint: {', '.join(sorted(info['missing_keys']))}"
        )
    return _served(net.to(device), raw, max_positions)


def _config_of(raw: dict[str, Any]) -> Any:
    """The configuration object of `config.json` contents."""
    return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


def _served(net: Any, raw: dict[str, Any], max_positions: int) -> TransformersModel:
    try:
        return TransformersModel(net.eval().requires_grad_(False), raw, max_positions)
    except UnsupportedModelError as e:
        raise UnsupportedModelError(f"{architecture_of(raw)} can not be served: {e}") from e
