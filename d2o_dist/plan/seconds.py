"""How long a prompt and a token take: work over the speed of a GPU, with fractions of that speed that are assumptions.

No GPU has run this library, so none of these fractions was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from d2o_dist.fields.declare import real
from d2o_dist.plan.gpus import Gpu
from d2o_dist.plan.memory import prompt_memory, weight_bytes
from d2o_dist.plan.traffic import PlannedTraffic, Sent
from d2o_dist.policy.rule import check_fields
from d2o_dist.slots.windows import Chunked, Window


@dataclass(frozen=True)
class Assumptions:
    """What the time model takes for granted.

    Attributes:
        matmul: fraction of the GPU's FLOP/s that products with weights reach while a prompt is read.
        attention: the same of attention and of the statistics taken from it.
        memory: fraction of the memory's bandwidth that decoding reaches.
        link: fraction of a link's bandwidth that collectives reach; nothing is sent while anything is computed.
        intra_us, inter_us: microseconds that a collective takes however little it sends, inside a node and between.
        host_us: microseconds that Python takes for a layer of a decode step that is not a CUDA graph. Steps of requests
            that several ranks share never are.
        usable: fraction of the GPU's memory that tensors can have.
    """

    matmul: float = real(0.5, above=0, high=1)
    attention: float = real(0.35, above=0, high=1)
    memory: float = real(0.6, above=0, high=1)
    link: float = real(0.7, above=0, high=1)
    intra_us: float = real(15.0, low=0)
    inter_us: float = real(30.0, low=0)
    host_us: float = real(500.0, low=0)
    usable: float = real(0.9, above=0, high=1)

    def __post_init__(self) -> None:
        check_fields(self, "assume")


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a batch on one replica.

    Attributes:
        prompt_weights, prompt_attention, prompt_links: until the first token: products with weights, attention, links.
        token_memory, token_host, token_links: of one token of each row.
    """

    prompt_weights: float
    prompt_attention: float
    prompt_links: float
    token_memory: float
    token_host: float
    token_links: float

    @property
    def first_token(self) -> float:
        """From the prompt to its first token."""
        return self.prompt_weights + self.prompt_attention + self.prompt_links

    @property
    def token(self) -> float:
        """From one token of each row to the next. Python runs ahead of the GPU; collectives wait for both."""
        return max(self.token_memory, self.token_host) + self.token_links

    @property
    def bottleneck(self) -> str:
        """What takes most of the prompt, and of a token."""
        prompt = {
            "products with weights": self.prompt_weights,
            "attention": self.prompt_attention,
            "links": self.prompt_links,
        }
        token = {"memory bandwidth": self.token_memory, "Python": self.token_host, "links": self.token_links}
        return f"{max(prompt, key=prompt.get)}; {max(token, key=token.get)}"


def times_of(traffic: PlannedTraffic, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> Times:
    """The times of the request that this is the traffic of."""
    model, share, batch, tokens = traffic.model, traffic.share, traffic.batch, traffic.tokens
    ranks, flops = share.tp * share.sp, gpu.tflops * 1e12
    readings = 2 if traffic.d2o.needs_reread else 1
    here = (model.matrices + model.kv_matrices * share.copies) / share.tp + model.whole_matrices
    here += model.experts_of(1) / share.cuts_of_more
    products = 2 * here / share.sp * batch * tokens * readings
    memory = prompt_memory(model, traffic.d2o, share, tokens, batch, dtype=traffic.dtype)
    # Of the embeddings the output head is read; of another table for the input, a row a token. Of the experts those
    # that the batch's tokens chose.
    experts = round(model.experts_of(batch))
    all_read = dataclasses.replace(model, embeddings=model.vocab * model.hidden, experts=experts)
    read = weight_bytes(all_read, share, traffic.dtype) + memory.kept
    links = _Links(gpu, gpus_per_node, assume, {"tp": share.tp, "sp": ranks, "request": ranks})
    return Times(
        prompt_weights=products / (flops * assume.matmul),
        prompt_attention=attention_flops(traffic) / ranks / (flops * assume.attention),
        prompt_links=links.seconds(traffic.prompt()),
        token_memory=read / (gpu.bandwidth_gb_s * 1e9 * assume.memory),
        token_host=model.num_layers * assume.host_us * 1e-6 if ranks > 1 else 0.0,
        token_links=links.seconds(traffic.steady()),
    )


def attention_flops(traffic: PlannedTraffic) -> float:
    """Of all ranks: two products of each query with the keys and values that it sees; and a product with the keys again
    where every query's attention is added up."""
    model, d2o, tokens = traffic.model, traffic.d2o, traffic.tokens
    windows = (*model.windows, *(model.windows[owner] for owner in model.looks))
    seen = sum(tokens * _keys_of_a_query(window, tokens) for window in windows)
    passes = 1 + model.value_dim / model.head_dim
    if d2o.needs_column_sums:
        sample = d2o.query_sample
        passes += 1 if sample is None else 1 / sample.stride
    if d2o.needs_reread:
        passes += 2 * 3  # all keys, whether before or after a query; attention, and what each key got
    return 2 * traffic.batch * model.num_heads * model.head_dim * seen * passes


def _keys_of_a_query(window: Window | None, tokens: int) -> float:
    """That it sees, mean over the queries of a prompt."""
    if isinstance(window, Chunked):
        return min(window.size, tokens) / 2
    return tokens / 2 if window is None else min(window, tokens / 2)


@dataclass(frozen=True)
class _Links:
    """How fast the ranks of an axis talk; spans: how many neighbouring GPUs an axis lies on."""

    gpu: Gpu
    gpus_per_node: int
    assume: Assumptions
    spans: dict[str, int]

    def seconds(self, sent: Iterable[Sent]) -> float:
        """Of collectives that are waited for, one after the other."""
        total = 0.0
        for one in sent:
            inside = self.spans[one.axis] <= self.gpus_per_node
            speed = (self.gpu.intra_gb_s if inside else self.gpu.inter_gb_s) * 1e9 * self.assume.link
            total += one.bytes / speed + one.calls * (self.assume.intra_us if inside else self.assume.inter_us) * 1e-6
        return total
