"""A naive float64 reading of the specification (restated in docs/algorithm.md), used as a test oracle.

Written from the specification alone, for one sequence of one request, with clarity before speed: slots are plain Python
objects, loops run over heads and slots, attention is dense. Section numbers in comments are those of the specification.
Where the specification leaves room, the reading taken is marked `READING`.
The knobs are in `naive_config`, budgets in `naive_budgets`, the cache in `naive_cache`; here is the model around it.

    result = run_oracle(model, input_ids, OracleConfig.preset("mass", keep_ratio=0.3), num_new_tokens=20)

Hugging Face's RMSNorm computes in float32 even in a float64 model. The oracle calls the model's own modules as they
are; `use_float64_norms(model)` makes both sides exact where a test wants differences below 1e-7.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .naive_cache import OracleCache
from .naive_config import PRESETS, OracleConfig
from .naive_slots import Eviction
from .naive_softmax import OracleSoftmax

__all__ = ["PRESETS", "OracleConfig", "OracleResult", "OracleSession", "one_thread", "run_oracle", "use_float64_norms"]


def use_float64_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Let every RMSNorm of `model` compute in the dtype of its input (Hugging Face's computes in float32); from now on
    the rotary embedding of Llama 4 too."""

    def unit(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        epsilon = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * unit(self, x)

    def around_one(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:  # Gemma's
        return (1 + self.weight) * unit(self, x)

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            is_around_one = hasattr(module, "eps") and not name.startswith(("Llama4", "Gemma3n", "Gemma4"))
            plain = forward if getattr(module, "with_scale", True) else unit
            module.forward = types.MethodType(around_one if is_around_one else plain, module)
        elif name == "Llama4TextL2Norm":
            module.forward = types.MethodType(unit, module)
        elif name == "Llama4TextAttention":
            importlib.import_module(type(module).__module__).apply_rotary_emb = _rotated
    return model


def _rotated(queries: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Llama 4's rotary embedding of [B, n, H, D], which computes in float32 there."""
    both = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns[:, :, None] for x in (queries, keys))
    return tuple(torch.view_as_real(x).flatten(-2) for x in both)


class OracleSession:
    """One sequence going through a Llama-type model: `feed` tokens in any order of prompts, chunks and decode steps.

    It may have sinks and experts (gpt-oss), soft caps and norms behind its parts (Gemma 2), values of another dim than
    keys (MiMo), or latents (DeepSeek).
    """

    def __init__(self, model: torch.nn.Module, config: OracleConfig) -> None:
        if model.dtype != torch.float64:
            model = copy.deepcopy(model).double()
        self.model, self.decoder = model.eval(), model.model
        first = self.decoder.layers[0].self_attn
        self.is_latent = hasattr(first, "kv_b_proj")
        if self.is_latent:
            num_heads, self.num_kv_heads = first.num_heads, 1
        else:
            self.head_dim = first.head_dim
            num_heads = first.q_proj.out_features // self.head_dim
            self.num_kv_heads = first.k_proj.out_features // self.head_dim
        self.cache = OracleCache(config, len(self.decoder.layers), num_heads, self.num_kv_heads)
        if self.is_latent:
            self.cache.latent, self.cache.expand = first.kv_lora_rank, self._expand
        self.apply_rotary = importlib.import_module(type(self.decoder).__module__).apply_rotary_pos_emb
        for layer in self.decoder.layers:
            if getattr(layer.self_attn, "sliding_window", None) is not None:
                raise ValueError("sliding windows are not part of the specification")

    def reread(self, token_ids: list[int]) -> None:
        """The second reading of a prompt: each chunk is one forward after the prompt, and is forgotten."""
        chunk = self.cache.config.reread_chunk
        for start in range(0, len(token_ids), chunk):
            self.feed(token_ids[start : start + chunk], again=True)

    @torch.no_grad()
    def feed(self, token_ids: list[int], again: bool = False) -> torch.Tensor:
        """One forward. Returns the logits [n, vocabulary] of its tokens. `again`: of a second reading."""
        cache = self.cache
        start = cache.num_seen_tokens
        # Section 5: "Prefill is every forward with more than one token since the last decode step". READING: the very
        # first forward is prefill whatever its length.
        decoding = len(token_ids) == 1 and start > 0 and not again
        if decoding:
            cache.finalize()
            cache.num_seen_tokens += 1
        hidden = self.decoder.embed_tokens(torch.tensor([token_ids]))
        position_ids = torch.arange(start, start + len(token_ids))[None]
        rotary = self.decoder.rotary_emb
        has_kinds = "layer_type" in inspect.signature(rotary.forward).parameters
        cos, sin = rotary(hidden, position_ids, *(["full_attention"] if has_kinds else []))
        for index, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            if self.is_latent:
                queries, keys, values = self._latent(attention, normed, cos, sin)
            else:
                queries = self._heads(attention.q_proj(normed), getattr(attention, "q_norm", None))
                keys = self._heads(attention.k_proj(normed), getattr(attention, "k_norm", None))
                values = attention.v_proj(normed).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
                values = values * getattr(attention, "v_scale", 1)
                queries, keys = self.apply_rotary(queries, keys, cos, sin)
            step = cache.decode_step if decoding else cache.reread_chunk if again else cache.prefill_chunk
            softmax = OracleSoftmax(
                attention.scaling, getattr(attention, "attn_logit_softcapping", None), getattr(attention, "sinks", None)
            )
            outputs = step(index, queries[0], keys[0], values[0], softmax)  # [Hq, n, D]
            hidden = self._after_attention(
                layer, hidden, attention.o_proj(outputs.transpose(0, 1).reshape(1, len(token_ids), -1))
            )
        if not decoding and not again:
            cache.finish_prefill_chunk(len(token_ids))
        logits = self.model.lm_head(self.decoder.norm(hidden))[0]
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _after_attention(self, layer: torch.nn.Module, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What a layer makes of its input and of what its attention adds."""
        if not hasattr(layer, "pre_feedforward_layernorm"):
            hidden = hidden + mixed
            added = layer.mlp(layer.post_attention_layernorm(hidden))
            return hidden + (added[0] if isinstance(added, tuple) else added)  # experts say too how they were chosen
        hidden = hidden + layer.post_attention_layernorm(mixed)
        return hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))

    def _latent(self, attention: torch.nn.Module, normed: torch.Tensor, cos, sin) -> tuple[torch.Tensor, ...]:
        """Latent attention (DeepSeek): a token's key is its latent c and one rotated part that all heads share, its
        value is c."""
        queries = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(normed)))
        queries = queries.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        latent, rotated = attention.kv_a_proj_with_mqa(normed).unsqueeze(1).split(
            [attention.kv_lora_rank, attention.qk_rope_head_dim], -1
        )
        latent = attention.kv_a_layernorm(latent)
        plain, turned = queries.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], -1)
        module = importlib.import_module(type(self.decoder).__module__)
        turned, rotated = module.apply_rotary_pos_emb_interleave(turned, rotated, cos, sin)
        return torch.cat([plain, turned], -1), torch.cat([latent, rotated], -1), latent

    def _expand(self, layer: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [S, r + R] -> keys [Hq, S, d + R] and values [Hq, S, D]: "k_h = [W_h c; rotated], v_h = V_h c"."""
        attention = self.decoder.layers[layer].self_attn
        latent, rotated = keys.split([attention.kv_lora_rank, attention.qk_rope_head_dim], -1)
        both = attention.kv_b_proj(latent).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        plain, values = both.split([attention.qk_nope_head_dim, attention.v_head_dim], -1)
        return torch.cat([plain, rotated.expand(len(plain), -1, -1)], -1), values

    def _heads(self, x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
        x = x.view(1, x.shape[1], -1, self.head_dim)
        return (x if norm is None else norm(x)).transpose(1, 2)


@dataclass
class OracleResult:
    tokens: list[int]  # the greedy tokens
    logits: torch.Tensor  # [num_new_tokens, vocabulary], row i chose tokens[i]
    budgets: list[tuple[int, int]]  # per layer (num_heavy, num_recent)
    ratios: list[float]  # per layer r_l
    achieved_ratio: float  # kept slots over L * T, right after finalize
    column_sums: list[torch.Tensor]  # per layer [Hq, T], of the first prefill
    thresholds_after_finalize: list[float | None]
    thresholds: list[float | None]
    after_finalize: list[dict[str, torch.Tensor]]  # OracleCache.snapshot
    final: list[dict[str, torch.Tensor]]
    evictions: list[Eviction]
    session: OracleSession  # to go on from here


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many tiny operations: several threads only wait for each other, here by a factor of ten and more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_oracle(
    model: torch.nn.Module,
    input_ids: torch.Tensor | list[int],
    oracle_config: OracleConfig,
    num_new_tokens: int,
    chunks: list[int] | None = None,
    forced_tokens: list[int] | None = None,
    session: OracleSession | None = None,
) -> OracleResult:
    """Prefill (in `chunks`, lengths that sum to the prompt), finalize, and decode greedily.

    As in Hugging Face's generate, the last new token is not fed back: n new tokens are one prefill and n - 1 decode
    steps. `forced_tokens` are fed in place of the greedy ones. `session` continues an earlier result's session, with
    `input_ids` as a later turn. A chunk of one token that is not the very first forward is a decode step.
    """
    session = session or OracleSession(model, oracle_config)
    cache = session.cache
    ids = [int(i) for i in input_ids]
    chunks = chunks or [len(ids)]
    if sum(chunks) != len(ids):
        raise ValueError(f"chunks {chunks} of a prompt of {len(ids)} tokens")
    start = 0
    first = cache.log_weights is None
    for length in chunks:
        last = session.feed(ids[start : start + length])[-1]
        start += length
    if first and cache.config.selection == "reread":
        session.reread(ids)
    cache.finalize()
    after_finalize, thresholds_after_finalize = cache.snapshot(), list(cache.thresholds)
    kept = sum(len(slots) for heads in cache.slots for slots in heads)
    achieved_ratio = kept / (cache.num_layers * cache.num_kv_heads * cache.num_seen_tokens)
    tokens, logits = [], []
    for step in range(num_new_tokens):
        logits.append(last)
        tokens.append(int(last.argmax()))
        if step + 1 < num_new_tokens:
            last = session.feed([tokens[-1] if forced_tokens is None else int(forced_tokens[step])])[-1]
    return OracleResult(
        tokens=tokens,
        logits=torch.stack(logits) if logits else torch.zeros(0, last.shape[0], dtype=last.dtype),
        budgets=list(cache.budgets),
        ratios=list(cache.ratios),
        achieved_ratio=achieved_ratio,
        column_sums=[torch.stack(sums) for sums in cache.column_sums],
        thresholds_after_finalize=thresholds_after_finalize,
        thresholds=list(cache.thresholds),
        after_finalize=after_finalize,
        final=cache.snapshot(),
        evictions=list(cache.evictions),
        session=session,
    )
