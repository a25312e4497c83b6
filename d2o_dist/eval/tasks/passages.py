"""Perplexity and fidelity: real text is read, the cache compressed, and what follows predicted, teacher-forced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from d2o_dist.config.eval_tasks import FidelityTask, PassageTask
from d2o_dist.eval.examples import Passage, Task, Tools


class Passages(Task):
    """See `PassageTask`. Metrics, in nats a token: `nll` of the text, `kl` from the full cache's distribution to the
    compressed one's; and `top1`, how often both have the same likeliest token."""

    metrics = ("kl", "top1", "nll")
    uses_template = False
    higher_is_better = False
    axes = None

    def __init__(self, config: PassageTask) -> None:
        self.config = config
        self.name = config.name
        self.primary = "kl" if isinstance(config, FidelityTask) else "nll"
        self.scoring: Mapping = {"kind": config.kind, "version": 1}

    def rows(self, tools: Tools) -> Sequence[Passage]:
        """The passages of every length. Those of one sample end at the same place of the text, whatever their length,
        so that the same tokens are predicted from more and more before them."""
        config = self.config
        ids = tools.tokenizer(tools.load_text(config.text), add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(config.lengths)
        span = longest + config.num_scored
        if tools.max_positions is not None and span > tools.max_positions:
            raise ValueError(
                f"{self.name}: a length ({longest}) and num_scored ({config.num_scored}) must be at most the model's "
                f"{tools.max_positions} positions together"
            )
        # Overlapping ones still differ: a passage that is counted twice would make errors look smaller than they are.
        need = span + config.samples - 1 if config.overlap else span * config.samples
        if len(ids) < need:
            raise ValueError(
                f"{self.name}: {config.samples} passages of {span} tokens need {need}, but text {config.text} has "
                f"{len(ids)}; give a longer text, fewer samples, or overlap: true"
            )
        step = (len(ids) - span) // max(config.samples - 1, 1)
        first = tuple(tools.tokenizer("a", verbose=False)["input_ids"][:1])
        # A tokenizer that begins every text with a special token has seen none other; keep that token at the beginning.
        begins = first if first and first[0] in set(tools.tokenizer.all_special_ids) else ()
        rows = []
        for length in config.lengths:
            for sample in range(config.samples):
                end = step * sample + longest
                read = begins + tuple(ids[end - length + len(begins) : end])
                rows.append(
                    Passage(
                        id=f"{length}-{sample}",
                        tokens=read + tuple(ids[end : end + config.num_scored]),
                        num_prompt=length,
                        continuation=config.continuation,
                        groups={"length": length},
                    )
                )
        return rows
