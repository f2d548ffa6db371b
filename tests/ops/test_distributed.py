"""Two processes: data parallelism, sharded parameters, and tensors that know how they are spread."""

import pytest
import torch
from torch import nn

import laco_kernels as lk
from tests.processes import WORLD, run_together

BATCH, CHANNELS, GRID = 4, 8, (4, 4)


class Net(nn.Module):
    """The operators of the papers, one behind the other."""

    def __init__(self):
        super().__init__()
        self.merge = lk.nn.PatchMergeLayer(CHANNELS, prefix_tokens=1, zero_init_last=False)
        self.spatial = lk.nn.SpatialTokenFusion(CHANNELS, CHANNELS)
        self.blocks = lk.nn.MultiBlockTokenFusion(CHANNELS, 2, prefix_tokens=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        y = self.merge(x, GRID)
        return torch.cat([self.spatial(y[:, 1:], (2, 2)), self.blocks([y, y.sin()])], dim=1)


def setting():
    """Return the same network and batch in every process."""
    torch.manual_seed(0)
    return Net().double(), torch.randn(BATCH, 17, CHANNELS, dtype=torch.float64)


def loss(y):
    return y.square().sum((1, 2)).mean()


def own(x, rank):
    return x.chunk(WORLD)[rank]


def whole(tensor):
    """Return a tensor in full, wherever its parts are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(got, expected):
    torch.testing.assert_close(whole(got), expected, rtol=1e-10, atol=1e-11)


def assert_same_gradients(net, alone):
    for (name, got), expected in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert expected.grad.abs().sum() > 0, name
        assert_same(got.grad, expected.grad)


def ddp(rank):
    alone, x = setting()
    net = nn.parallel.DistributedDataParallel(setting()[0])
    loss(alone(x)).backward()
    loss(net(own(x, rank))).backward()
    assert_same_gradients(net.module, alone)


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (alone, x), (net, _) = setting(), setting()
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (*net.children(), net):
        fully_shard(part, mesh=mesh)
    assert all(p.to_local().numel() < p.numel() for p in net.parameters()), "nothing is sharded"
    before = [p.detach().clone() for p in alone.parameters()]
    for model, batch in ((alone, x), (net, own(x, rank))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loss(model(batch)).backward()
        optimizer.step()
    for got, expected, old in zip(net.parameters(), alone.parameters(), before, strict=True):
        assert not torch.equal(expected, old)
        assert_same(got, expected)


def dtensor_network(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    alone, x = setting()
    loss(alone(x)).backward()
    for sizes, placements in (((2,), [Shard(0)]), ((1, 2), [Shard(0), Shard(0)])):
        mesh = init_device_mesh("cpu", sizes)
        net = distribute_module(setting()[0], mesh)
        y = net(distribute_tensor(x, mesh, placements))
        assert y.to_local().shape[0] == BATCH // WORLD
        assert_same(y, alone(x))
        loss(y).backward()
        assert_same_gradients(net, alone)


def merge(x, *weights, grid=GRID):
    return lk.patch_merge(x, *weights, grid=grid, pad=True)


def conv(x, *weights, grid=GRID):
    return lk.strided_conv_gelu(x, *weights, grid=grid, pad=True)


def plain_conv(x, *weights, grid=GRID):
    return lk.strided_conv(x, *weights, grid=grid, pad=True)


def fusion(x, *weights, grid=None):
    return lk.multi_block_linear_gelu([x, x + 1, x], *weights)


def mlp(x, *weights, grid=None):
    return lk.gelu_mlp(x, *weights)


def packed(x, *weights, grid=None):
    return lk.packed_linear(x, weights[:2], weights[2:])


OPERATORS = [
    (mlp, [(5, CHANNELS), (5,), (CHANNELS, 5), (CHANNELS,)]),
    (merge, [(5, 4 * CHANNELS), (5,), (CHANNELS, 5), (CHANNELS,)]),
    (conv, [(5, 4 * CHANNELS), (5,)]),
    (plain_conv, [(5, 4 * CHANNELS), (5,)]),
    (fusion, [(5, 3 * CHANNELS), (5,)]),
    (packed, [(5, CHANNELS), (4, CHANNELS), (5,), (4,)]),
]


def check_operator(call, tensors, placements, needs, grid=GRID, *, communicates=False, compiled=False):
    """Compare an operator on spread tensors with the same on whole ones, forward and backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    plain = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    spread = [
        distribute_tensor(t, mesh, [p]).requires_grad_(need) for t, p, need in zip(tensors, placements, needs, strict=True)
    ]
    y = call(*plain, grid=grid)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    split = distribute_tensor(grad, mesh, placements[:1])
    if compiled:  # dynamo does not trace below a mode
        z = torch.compile(call, backend="aot_eager", fullgraph=True)(*spread, grid=grid)
        z.backward(split)
    else:
        with CommDebugMode() as comm:
            z = call(*spread, grid=grid)
            z.backward(split)
        assert (comm.get_total_counts() > 0) is communicates
    assert z.placements == (placements[0],)
    assert_same(z, y)
    for i, (p, s) in enumerate(zip(plain, spread, strict=True)):
        assert (s.grad is None) is (p.grad is None)
        if p.grad is not None:
            if not communicates:
                summed = Partial("sum") if placements[0] == Shard(0) else Replicate()
                assert s.grad.placements == (summed if i else placements[0],)
            assert_same(s.grad, p.grad)


def each_operator():
    torch.manual_seed(0)
    for call, shapes in OPERATORS:
        yield call, [torch.randn(s, dtype=torch.float64) for s in ((BATCH, 16, CHANNELS), *shapes)]


def dtensor_operators(rank):
    from torch.distributed.tensor import Replicate, Shard

    for call, tensors in each_operator():
        count = len(tensors)
        for first in (Shard(0), Replicate()):
            placements = [first] + [Replicate()] * (count - 1)
            # The same shapes and other settings: DTensor must not take what it inferred for one for the other.
            for alone in range(count):
                check_operator(call, tensors, placements, [i == alone for i in range(count)])
            for grid in ((4, 4), (2, 8), (1, 16), (16, 1)):
                check_operator(call, tensors, placements, [True] * count, grid)


def dtensor_redistributes(rank):
    from torch.distributed.tensor import Replicate, Shard

    for call, tensors in each_operator():
        placements = [Shard(0), Shard(1)] + [Replicate()] * (len(tensors) - 2)
        check_operator(call, tensors, placements, [True] * len(tensors), communicates=True)


def dtensor_compiled(rank):
    from torch.distributed.tensor import Replicate, Shard

    for call, tensors in each_operator():
        placements = [Shard(0)] + [Replicate()] * (len(tensors) - 1)
        check_operator(call, tensors, placements, [True] * len(tensors), compiled=True)


# Compiled first: the rules must be there even if the first to see a DTensor is a trace.
CHECKS = [dtensor_compiled, ddp, fsdp, dtensor_network, dtensor_operators, dtensor_redistributes]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run_together(CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_processes(failures, check):
    for rank, failed in enumerate(failures):
        assert check not in failed, f"rank {rank}:\n{failed[check]}"
