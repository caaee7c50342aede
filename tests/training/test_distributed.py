"""Two training processes as two threads: what they compute together is what one would of the whole batch."""

from __future__ import annotations

import copy
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distilldsm.core.errors import ConfigError, UserError
from distilldsm.training import distributed
from distilldsm.training.distributed import GlobalBatchNorm2d, Processes, share_batch_statistics, training_processes
from distilldsm.training.loading import batch_size_of
from distilldsm.training.losses import soft_dice_loss


@pytest.fixture
def on_both(monkeypatch) -> Callable:
    """Runs a function of the rank in two threads that sum over each other, and returns both results."""
    meeting, slots = threading.Barrier(2, timeout=30), {}

    def all_reduce(values: torch.Tensor) -> None:
        slots[threading.get_ident()] = values.clone()
        meeting.wait()
        total = sum(slots.values())
        meeting.wait()
        values.copy_(total)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")

    def run(function: Callable) -> list:
        slots.clear()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, range(2)))

    return run


def test_sums_and_dictionaries_are_those_of_both(on_both):
    assert on_both(lambda rank: Processes(rank, 2).sum(torch.tensor([1.0 + rank])).item()) == [3, 3]
    own = [{"a": [1.0]}, {"case with a long name": [0.5, 0.25], "ü": []}]
    assert on_both(lambda rank: Processes(rank, 2).gather(own[rank])) == [own[0] | own[1]] * 2
    assert [Processes(rank, 2).is_main for rank in range(2)] == [True, False]


def test_one_process_waits_for_nobody(monkeypatch):
    for name in ("all_reduce", "barrier", "get_backend"):
        monkeypatch.setattr(dist, name, lambda *_: pytest.fail("there is nobody else"))
    alone, values = Processes(), torch.ones(2)
    alone.barrier()
    assert alone.sum(values) is alone.differentiable_sum(values) is values
    assert alone.gather({"a": [1.0]}) == {"a": [1.0]}
    waited = []
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(1))
    Processes(world=2).barrier()
    assert waited == [1]


def test_batch_statistics_and_gradients_are_those_of_the_whole_batch(on_both):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5, 4) * 2 + 1
    whole = nn.BatchNorm2d(3, momentum=0.3)
    nn.init.normal_(whole.weight), nn.init.normal_(whole.bias)
    shares = [share_batch_statistics(copy.deepcopy(whole), "cpu") for _ in range(2)]
    assert {type(share) for share in shares} == {GlobalBatchNorm2d}
    for _ in range(2):
        full = x.clone().requires_grad_()
        expected = whole(full)
        expected.pow(3).sum().backward()

        def step(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            part = x[rank::2].clone().requires_grad_()
            out = shares[rank](part)
            out.pow(3).sum().backward()
            return out.detach(), part.grad

        for rank, (out, gradient) in enumerate(on_both(step)):
            torch.testing.assert_close(out, expected[rank::2].detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(gradient, full.grad[rank::2], atol=1e-3, rtol=1e-4)
    summed = shares[0].weight.grad + shares[1].weight.grad
    torch.testing.assert_close(summed, whole.weight.grad, atol=1e-2, rtol=1e-4)
    for share in shares:
        assert share.num_batches_tracked == 2
        torch.testing.assert_close(share.running_mean, whole.running_mean)
        torch.testing.assert_close(share.running_var, whole.running_var)
        torch.testing.assert_close(share.eval()(x), copy.deepcopy(whole).eval()(x))


def test_soft_dice_is_that_of_the_whole_batch(on_both):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 2, 5, 6), torch.randint(0, 3, (4, 2, 5, 6))
    whole = soft_dice_loss(logits, labels)

    def share(rank: int) -> float:
        return float(
            soft_dice_loss(logits[rank::2], labels[rank::2], over_processes=Processes(rank, 2).differentiable_sum)
        )

    assert on_both(share) == [pytest.approx(float(whole))] * 2


@pytest.fixture
def joined(monkeypatch) -> list[tuple]:
    """WORLD_SIZE=2, with nobody there to meet."""
    calls: list[tuple] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(distributed, "_join", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(signal, "signal", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    return calls


def test_a_group_is_joined_and_left(joined, monkeypatch):
    with training_processes("cpu") as found:
        assert found == Processes(rank=0, world=2, local_rank=1)
    assert joined == [(signal.SIGTERM, signal.SIG_DFL), ("gloo", 2), "left"]
    monkeypatch.delenv("WORLD_SIZE")
    with training_processes("cpu") as found:
        assert found == Processes(rank=0, world=1, local_rank=0)
    assert len(joined) == 3


@pytest.mark.parametrize("error", [dist.DistNetworkError("x"), RuntimeError("[x] Broken pipe\nmore")])
def test_another_process_that_ended_is_told_once(joined, monkeypatch, error):
    def fail() -> None:
        with training_processes("cpu"):
            raise error

    with pytest.raises(UserError, match="another process of this training has ended") as caught:
        fail()
    assert caught.value.seen == str(error).splitlines()[0]
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(SystemExit) as ended:
        fail()
    assert ended.value.code == 1
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        fail()
    assert joined.count("left") == 3


@pytest.mark.parametrize(
    ("set_to", "begun", "planned", "unit", "batch"),
    [(None, 0, 8, 3, 6), (None, 0, 2, 3, 3), (None, 0, 6, 3, 6), (4, 0, 8, 2, 4), (None, 4, 8, 2, 4), (6, 4, 8, 2, 6)],
)
def test_a_batch_is_shared_evenly(set_to, begun, planned, unit, batch):
    assert batch_size_of(set_to, begun_with=begun, planned=planned, unit=unit) == batch
    for options in ({"set_to": 5, "begun_with": 0}, {"set_to": None, "begun_with": 5}):
        with pytest.raises(ConfigError, match="cannot be divided evenly") as caught:
            batch_size_of(**options, planned=8, unit=2)
        assert ("start of this training" in str(caught.value.seen)) == (options["set_to"] is None)


@pytest.mark.parametrize(("local_world", "address"), [("2", "127.0.0.1"), ("1", None)])
def test_a_host_name_that_does_not_resolve(monkeypatch, local_world, address):
    """The loopback address serves the processes of one machine; those of several get a message."""

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("MASTER_ADDR", "pod-without-a-name")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
    if address is None:
        with pytest.raises(UserError, match=r"pod-without-a-name(.|\n)*--local-addr"):
            distributed._check_main_address(2)
    else:
        distributed._check_main_address(2)
        assert os.environ["MASTER_ADDR"] == address
