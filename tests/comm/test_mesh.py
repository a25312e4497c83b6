"""Meshes: the layout, errors before anything starts, and other libraries' groups read as ours."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from d2o_dist.comm import (
    Collectives,
    Mpu,
    ParallelMesh,
    build_mesh,
    check_world,
    from_deepspeed,
    from_device_mesh,
    from_groups,
    from_megatron,
    to_device_mesh,
)
from d2o_dist.comm.mesh import AXES
from tests.ranks import run_ranks

GRIDS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 4), (4, 1, 1)]
multirank = pytest.mark.multirank


def check_mesh(mesh, rank, dp, sp, tp):
    """The layout promised by the module, and groups that work."""
    dp_i, sp_i, tp_i = rank // (sp * tp), rank // tp % sp, rank % tp
    assert (mesh.dp, mesh.sp, mesh.tp, mesh.rank, mesh.world_size) == (dp, sp, tp, rank, dp * sp * tp)
    assert (mesh.dp_rank, mesh.sp_rank, mesh.tp_rank) == (dp_i, sp_i, tp_i)
    assert mesh.leads_request == (sp_i == tp_i == 0)
    expected = {
        "dp": [(d * sp + sp_i) * tp + tp_i for d in range(dp)],
        "sp": [(dp_i * sp + s) * tp + tp_i for s in range(sp)],
        "tp": [(dp_i * sp + sp_i) * tp + t for t in range(tp)],
        "request": [dp_i * sp * tp + i for i in range(sp * tp)],
        "dp_sp": [i * tp + tp_i for i in range(dp * sp)],
        "world": list(range(dp * sp * tp)),
    }
    for name, ranks in expected.items():
        axis = mesh.axis(name)
        assert (axis.name, axis.ranks, axis.size, axis.rank) == (name, tuple(ranks), len(ranks), ranks.index(rank))
        assert (axis.group is None) == (axis.size == 1)
        assert Collectives(axis).all_gather(torch.tensor([rank]), 0).tolist() == ranks
        if axis.group is not None:
            assert dist.get_rank(axis.group) == axis.rank


def built(rank, world, grid):
    mesh = build_mesh(*grid)
    check_mesh(mesh, rank, *grid)
    if world > 1:
        # Axes of the same ranks share a group: every group costs sockets or NCCL buffers.
        groups = {axis.ranks: axis.group for axis in mesh.axes.values() if axis.size > 1}
        assert all(groups[axis.ranks] is axis.group for axis in mesh.axes.values() if axis.size > 1)
        assert groups[tuple(range(world))] is dist.group.WORLD
    check_mpu(Mpu(mesh), mesh)


def check_mpu(mpu, mesh):
    for method, name in (
        ("model_parallel", "tp"),
        ("tensor_model_parallel", "tp"),
        ("data_parallel", "dp"),
        ("sequence_parallel", "sp"),
        ("sequence_data_parallel", "dp_sp"),
    ):
        axis = mesh.axis(name)
        group = getattr(mpu, f"get_{method}_group")()
        assert getattr(mpu, f"get_{method}_rank")() == dist.get_rank(group) == axis.rank
        assert getattr(mpu, f"get_{method}_world_size")() == dist.get_world_size(group) == axis.size
        assert tuple(dist.get_process_group_ranks(group)) == (axis.ranks if axis.size > 1 else (mesh.rank,))
    assert mpu.get_tensor_model_parallel_src_rank() == mesh.axis("tp").ranks[0]
    assert mpu.get_data_parallel_group_ranks() == list(mesh.axis("dp").ranks)


@multirank
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_build_mesh_and_mpu(grid):
    run_ranks(grid[0] * grid[1] * grid[2], built, grid)


def from_meshes(rank, world):
    for names, shape, grid in (
        (("sp", "tp"), (2, 2), (1, 2, 2)),
        (("dp", "tp"), (2, 2), (2, 1, 2)),
        (("dp", "sp", "tp"), (2, 2, 1), (2, 2, 1)),
        (("sp",), (4,), (1, 4, 1)),
    ):
        theirs = init_device_mesh("cpu", shape, mesh_dim_names=names)
        mesh = from_device_mesh(theirs)
        check_mesh(mesh, rank, *grid)
        for name in names:
            if 1 < mesh.axis(name).size < world:
                assert mesh.axis(name).group.group_name == theirs.get_group(name).group_name
    mesh = build_mesh(sp=2, tp=2)
    back = to_device_mesh(mesh, "tp", "cpu")
    assert back.mesh_dim_names == ("tp",) and back.get_group() is mesh.axis("tp").group
    assert back.mesh.tolist() == list(mesh.axis("tp").ranks) and back.get_local_rank() == mesh.tp_rank
    with pytest.raises(ValueError, match="dp has size 1"):
        to_device_mesh(mesh, "dp", "cpu")
    with pytest.raises(ValueError, match=r"mesh_dim_names \('tp', 'sp'\) must be some of"):
        from_device_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "sp")))
    part = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))["tp"]
    with pytest.raises(ValueError, match=r"world size \(4\) must equal dp \(1\) x sp \(1\) x tp \(2\) = 2"):
        from_device_mesh(part)


@multirank
def test_device_meshes_both_ways():
    run_ranks(4, from_meshes)


def unknown():
    raise AssertionError("group is not initialized")  # how DeepSpeed and Megatron say it


def from_fakes(rank, world):
    for grid in ((1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)):
        ours = build_mesh(*grid)
        group = {name: ours.axis(name).group for name in AXES}
        lone = {name: (lambda g: lambda: g)(group[name]) if group[name] else unknown for name in AXES}
        mesh = from_deepspeed(Mpu(ours))
        check_mesh(mesh, rank, *grid)
        check_mesh(
            from_megatron(
                SimpleNamespace(
                    get_tensor_model_parallel_group=lone["tp"],
                    get_context_parallel_group=lone["sp"],
                    get_data_parallel_group=lone["dp"],
                )
            ),
            rank,
            *grid,
        )
        # An old mpu: model parallel is tensor parallel, and no sequence axis. What is left over is data parallel.
        if grid[1] == 1:
            old = SimpleNamespace(get_model_parallel_group=lone["tp"], get_data_parallel_group=lone["dp"])
            check_mesh(from_deepspeed(old), rank, *grid)
    # DeepSpeed's own mpu for Ulysses calls the sequence group "model parallel".
    sequence = build_mesh(dp=2, sp=2).axis("sp").group
    ulysses = SimpleNamespace(
        initialize_sequence_parallel=None,
        get_sequence_parallel_group=lambda: sequence,
        get_model_parallel_group=lambda: sequence,
    )
    mesh = from_deepspeed(ulysses)
    check_mesh(mesh, rank, 2, 2, 1)
    assert mesh.axis("sp").group is sequence


@multirank
def test_groups_of_deepspeed_and_megatron():
    run_ranks(4, from_fakes)


def wrong_groups(rank, world):
    pairs = build_mesh(dp=2, tp=2)
    alone = Mpu(build_mesh(dp=4)).get_model_parallel_group()
    with pytest.raises(ValueError, match=r"data parallel size \(1\) must be 2 .*: pipeline parallelism is not"):
        from_groups(tp=pairs.axis("tp").group, dp=alone)
    with pytest.raises(ValueError, match="must form equal grids"):
        from_groups(tp=pairs.axis("tp").group, sp=pairs.axis("tp").group)
    lopsided = [dist.new_group([0, 1, 2]), dist.new_group([3])]
    with pytest.raises(ValueError, match="must form equal grids"):
        from_groups(tp=lopsided[rank == 3])


@multirank
def test_groups_that_are_no_grid_are_refused():
    run_ranks(4, wrong_groups)


def real_deepspeed(rank, world):
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now, for a minute
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    deepspeed.init_distributed("gloo", dist_init_required=False)
    check_mesh(from_deepspeed(), rank, world, 1, 1)
    parallel_state_sp.initialize_sequence_parallel(2)
    check_mesh(from_deepspeed(parallel_state_sp), rank, world // 2, 2, 1)
    groups._init_tp_mesh_device(2)
    mesh = from_deepspeed()
    check_mesh(mesh, rank, world // 2, 1, 2)

    # And ours given to it: two tensor ranks of two sequence ranks, ZeRO over those with the same weights.
    ours = build_mesh(sp=2, tp=2)
    torch.manual_seed(ours.tp_rank)
    model = torch.nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    config |= {"zero_allow_untested_optimizer": True}  # its own would be compiled
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=Mpu(ours))
    assert (engine.dp_world_size, engine.mp_world_size, engine.sequence_parallel_size) == (1, 2, 2)
    assert dist.get_process_group_ranks(engine.seq_data_parallel_group) == list(ours.axis("dp_sp").ranks)
    engine.backward(engine(torch.ones(1, 4)).sum() * (1 + ours.sp_rank))
    engine.step()
    return ours.tp_rank, model.weight.detach()


@multirank
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_real_deepspeed_groups_and_mpu():
    shards = run_ranks(4, real_deepspeed, fresh=True)
    weights = [[weight for tp_rank, weight in shards if tp_rank == shard] for shard in range(2)]
    assert torch.equal(*weights[0]) and torch.equal(*weights[1]) and not torch.equal(weights[0][0], weights[1][0])


def test_local_mesh():
    mesh = ParallelMesh.local()
    assert mesh == build_mesh()
    assert (mesh.world_size, mesh.rank, mesh.leads_request) == (1, 0, True)
    assert {(axis.size, axis.rank, axis.group) for axis in mesh.axes.values()} == {(1, 0, None)}
    assert mesh.axis(("sp", "tp")) is mesh.axis("request") and mesh.axis(("dp", "sp")) is mesh.axis("dp_sp")
    assert str(mesh) == "rank 0 (dp 0 of 1, sp 0 of 1, tp 0 of 1)"
    assert Mpu(mesh).get_model_parallel_world_size() == 1
    with pytest.raises(KeyError, match="no axis 'pp'"):
        mesh.axis("pp")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 2, 2, 6), r"world size \(6\) must equal dp \(1\) x sp \(2\) x tp \(2\) = 4: start 4 ranks \(torchrun"),
        ((1, 2, 2, 8), r"world size \(8\) must equal .* = 4: .*, or set dp to 2"),
        ((1, 0, 2, 2), r"sp \(0\) must be at least 1"),
        ((1, 1, 2, 1), r"world size \(1\) must equal .* = 2"),
    ],
)
def test_sizes_that_do_not_fit_the_world(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_world(*sizes)


def test_sizes_are_checked_without_a_process_group():
    with pytest.raises(ValueError, match=r"world size \(1\) must equal dp \(1\) x sp \(2\)"):
        build_mesh(sp=2)
