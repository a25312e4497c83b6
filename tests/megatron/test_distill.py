"""`d2o_distill` on a Megatron model, with Megatron's wrapper and optimizer, over tensor and context ranks."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from d2o_dist.comm.collectives import Collectives
from d2o_dist.config.distill import DistillConfig
from d2o_dist.policy.config import D2OConfig
from d2o_dist.train.objective import Objective, Part
from d2o_dist.train.ulysses import GradientExchange
from tests.models import tiny_model, tokens
from tests.ranks import run_ranks

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.multirank
CONTEXT, CONTINUATION, ROWS = 48, 16, 2
D2O = D2OConfig.preset("d2o", keep_ratio=0.25, budget={"min_layers": 0, "min_layer_tokens": 4})


class OnCPU(TorchFunctionMode):
    """Megatron's optimizers make tensors on "cuda" whatever there is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def part_of(ids, start, stop, mesh):
    """The tokens of this context rank."""
    length = (stop - start) // mesh.sp
    begin = start + mesh.sp_rank * length
    positions = torch.arange(begin, begin + length).expand(len(ids), -1)
    return Part(ids[:, begin : begin + length], positions, ids[:, begin + 1 : begin + length + 1])


def distilled(rank, world, tp, cp, steps):
    """KL (a token, in nats) of each step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from d2o_dist.models.megatron.trainable import TrainableGPT
    from tests.megatron.gpt import gpt_of, megatron_ranks

    with megatron_ranks(tp, cp) as mesh, OnCPU():
        source = tiny_model("qwen3", num_hidden_layers=2).float()
        gpt = gpt_of(source, calculate_per_token_loss=True).train()
        wrapped = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
        # Its DistributedOptimizer takes tensors of GPUs only, and clips with tensors on one.
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, weight_decay=0.0, clip_grad=0.0), [wrapped])
        exchange = GradientExchange(Collectives(mesh.axis("sp")), Collectives(mesh.axis("tp")))
        objective = Objective(TrainableGPT(gpt, source.config.vocab_size), exchange, DistillConfig(), loss_tile=8)
        ids, found = tokens(ROWS, CONTEXT + CONTINUATION + 1), []
        parts = {"context": part_of(ids, 0, CONTEXT, mesh),
                 "continuation": part_of(ids, CONTEXT, CONTEXT + CONTINUATION, mesh)}  # fmt: skip
        for _ in range(steps):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            losses = objective("d2o_distill", d2o=D2O, counts={"continuation": ROWS * CONTINUATION}, **parts)
            losses.total.backward()
            finalize_model_grads([wrapped])
            assert optimizer.step()[0]
            kl = Collectives(mesh.axis("sp")).all_gather(losses.sums["kl"][None], 0).sum().item()
            found.append(kl / (ROWS * CONTINUATION))
        return found


FEW = 5


@pytest.fixture(scope="module")
def alone():
    (found,) = run_ranks(1, distilled, 1, 1, FEW, timeout_s=300)
    return found


@pytest.mark.parametrize(("tp", "cp", "steps"), [(2, 1, FEW), (1, 2, 50)])
def test_ranks_distill_as_one_process_and_fifty_steps_lower_the_divergence(alone, tp, cp, steps):
    first, second = run_ranks(2, distilled, tp, cp, steps, timeout_s=300)
    assert first == pytest.approx(second, rel=1e-6)
    assert first[:FEW] == pytest.approx(alone, rel=1e-5)
    assert min(alone) < alone[0] and (steps == FEW or first[-1] < 0.5 * first[0])


def refused(rank, world):
    from d2o_dist.models.megatron.trainable import TrainableGPT
    from tests.megatron.gpt import gpt_of, megatron_ranks

    with megatron_ranks(), pytest.raises(ValueError) as caught:
        TrainableGPT(gpt_of(tiny_model()), 89)
    return str(caught.value)


def test_gradients_that_would_be_averages_are_refused():
    (said,) = run_ranks(1, refused, timeout_s=300)
    assert said == "calculate_per_token_loss (False) must be True, to distill under compression"
