"""The eviction in CUDA C++ does what `core` does under every value of every field, or says that it does not know it."""

import pytest
import torch

from d2o_dist.bench.checks import cuda_evict, merge_rules
from d2o_dist.compression.evict import steps_in_place
from d2o_dist.config import D2OConfig
from d2o_dist.core.merge import merge_into
from d2o_dist.core.types import D2OState
from d2o_dist.kernels import backend
from d2o_dist.kernels.backend import set_backend
from d2o_dist.kernels.cuda import build, params
from d2o_dist.kernels.cuda.evict import EvictionRows
from d2o_dist.kernels.cuda.evict import cuda_evict as evict
from d2o_dist.kernels.cuda.library import Host, host_build
from tests.variations import variations

pytestmark = pytest.mark.skipif(build.find_host_compiler() is None, reason="no C++ compiler on this machine")
CASE = cuda_evict.Case((40, 33), (20, 18), (5, 4), head_dim=16, parts=(None,), evictions=2)
READ = (*params.CHOICES, *params.NUMBERS)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with host_build(Host(build.build_host(tmp_path_factory.mktemp("rules") / "libhost.so"))):
        yield


def wrong(config: D2OConfig) -> dict:
    errors = cuda_evict.run_rules(config, CASE, torch.float32, "cpu").errors
    assert errors
    return {name: error for name, error in errors.items() if not error[0] <= error[1]}


def test_every_value_of_every_field_is_served_as_core_has_it_or_declared(host):
    served, failed = 0, {}
    for name, config in variations():
        if params.unserved_rule(config) is None:
            served += 1
            if found := wrong(config):
                failed[name] = found
    assert failed == {}
    assert served > 300


class Watched:
    """A configuration that notes which of its fields are read."""

    def __init__(self, config: D2OConfig, read: set[str]) -> None:
        self._config, self._read = config, read

    def __getattr__(self, name: str):
        self._read.add(name)
        return getattr(self._config, name)


def test_the_table_names_all_that_core_reads():
    """In an eviction while decoding, under whatever rules. What a slot count is split into it is told by number."""
    slots, read = cuda_evict.buffers_of(CASE, torch.float32, "cpu"), set()
    rows = EvictionRows(CASE.held, CASE.heavy, CASE.recent, [60, 60])
    for _, config in variations():
        cuda_evict._oracle(slots, rows, D2OState(torch.tensor([0.6, 0.7])), Watched(config, read))
    # Of the pooling at the end of a prompt no more is read than whether there is one: `rate_gain`.
    assert read - {"selection_reach"} == set(READ)


def test_merging_reads_what_its_checks_vary():
    """The fields that the checks of the merge kernel go through."""
    slots, read = cuda_evict.buffers_of(CASE, torch.float32, "cpu"), set()
    nothing = torch.zeros(2, 2, slots.keys.shape[2])
    for _, config in variations():
        merge_into(slots, slots, nothing, nothing.long(), nothing == 0, Watched(config, read))
    assert read == {"merge", *merge_rules.NUMBERS}


@pytest.mark.parametrize("name", READ)
def test_core_reads_what_the_table_names(name):
    """A rule that only seems to be one would hide that the kernel ignores it."""
    slots = cuda_evict.buffers_of(CASE, torch.float32, "cpu")
    rows = EvictionRows(CASE.held, CASE.heavy, CASE.recent, [60, 60])
    state = D2OState(threshold=torch.tensor([0.6, 0.7]))
    found: dict[tuple, list] = {}
    for _, config in variations((name,)):
        other = tuple(getattr(config, one) for one in READ if one != name)
        after, left = cuda_evict._oracle(slots, rows, state, config)
        found.setdefault(other, []).append((getattr(config, name), [*vars(after).values(), left.threshold]))
    assert any(
        one != two and not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True))
        for same in found.values() for one, left in same for two, right in same
        if (left[-1] is None) == (right[-1] is None) and left[-1] is not None
    )  # fmt: skip


def test_a_rule_that_it_does_not_know_is_left_to_others_or_refused(host, monkeypatch, caplog):
    known = {**params.CHOICES, "selection": ("cumulative",)}
    monkeypatch.setattr(params, "CHOICES", known)
    monkeypatch.setattr(backend, "_chosen", "auto")
    backend._say.cache_clear()
    set_backend("cuda")
    slots, lists = cuda_evict.buffers_of(CASE, torch.float32, "cpu"), dict(held=[40, 33], kept=[25, 22])
    asked = dict(num_seen=[60, 60], all_heads_here=True)
    assert steps_in_place(slots, D2OState(), D2OConfig(), **lists, **asked) is None
    assert "evictions with selection (window)" in caplog.text
    with pytest.raises(ValueError, match=r"selection \(window\) is a rule that evictions of backend 'cuda' do not kn"):
        evict(slots, EvictionRows(CASE.held, CASE.heavy, CASE.recent, [60, 60]), D2OState(), D2OConfig())
