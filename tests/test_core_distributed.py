"""Two gloo processes give the gradients of one process with both batches: DDP, and FSDP2 with every layer sharded."""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes import this file by itself
from models import inputs, output  # noqa: E402
from reslora_diffusion import calibrate, get_adapter, handover, merged_factors  # noqa: E402
from test_core_shortcuts import adapted  # noqa: E402

CASES = [("none", 1), ("input", 1), ("block", 2), ("middle", 2), ("middle", None)]


def mean_loss(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def expected(shortcut: str, num_previous: int | None) -> dict[str, torch.Tensor]:
    """Gradients of the mean over both processes' batches."""
    model = adapted("llama", shortcut, num_previous)
    (sum(mean_loss(output("llama", model, inputs("llama", seed=rank))) for rank in range(2)) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def by_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def by_fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def compare(rank: int, wrap: Callable[[nn.Module], nn.Module], checkpointing: bool) -> dict[tuple, float]:
    """The largest error of any gradient, by case."""
    errors = {}
    for shortcut, num_previous in CASES:
        wanted = expected(shortcut, num_previous)
        model = adapted("llama", shortcut, num_previous)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        wrapped = wrap(model)
        mean_loss(output("llama", wrapped, inputs("llama", seed=rank))).backward()
        assert get_adapter(model).skipped == {}
        found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == wanted.keys()
        worst = max((found[name] - wanted[name]).abs().max().item() for name in wanted)
        errors[shortcut, num_previous] = worst / max(g.abs().max().item() for g in wanted.values())
    return errors


def whole(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def calibrate_apart(rank: int) -> dict[str, torch.Tensor]:
    model = adapted("llama", "middle", 1)
    calibrate(model, [inputs("llama", seed=n) for n in (rank, rank + 2)], lambda m, batch: m(*batch))
    return {name: factors.lora_A.detach() for name, factors in merged_factors(model).items()}


def merge_everything(model: nn.Module, batches: list) -> dict[str, torch.Tensor]:
    """What comes of a model by each way out: factors by two methods, outputs merged, unmerged and handed over."""
    controller, found = get_adapter(model), {}
    for method in ("paper_weight", "least_squares"):
        controller.config.merge_method = method
        calibrate(model, batches, lambda m, batch: m(*batch))
        found |= {f"{method} {name}": f.lora_A.detach().clone() for name, f in merged_factors(model).items()}
    with torch.no_grad():
        for layer in controller.layers.values():
            layer.merge()
        found["merged"] = output("llama", model, inputs("llama", seed=9)).clone()
        for layer in controller.layers.values():
            layer.unmerge()
        found["unmerged"] = output("llama", model, inputs("llama", seed=9)).clone()
        handover(model)
        found["handed over"] = output("llama", model, inputs("llama", seed=9)).clone()
    return found


def merge_sharded(rank: int) -> dict[str, dict[str, torch.Tensor] | str]:
    results: dict[str, dict[str, torch.Tensor] | str] = {}
    for shortcut, num_previous in (("input", 1), ("middle", None)):
        model = by_fsdp(adapted("llama", shortcut, num_previous))
        batches = [inputs("llama", seed=n) for n in (rank, rank + 2)]
        results[shortcut] = merge_everything(model, batches)
    block = by_fsdp(adapted("llama", "block", 1))
    try:
        handover(block)
    except RuntimeError as error:
        results["block"] = str(error)
    return results


JOBS = {
    "ddp": partial(compare, wrap=by_ddp, checkpointing=False),
    "ddp-checkpointed": partial(compare, wrap=by_ddp, checkpointing=True),
    "fsdp": partial(compare, wrap=by_fsdp, checkpointing=False),
    "fsdp-checkpointed": partial(compare, wrap=by_fsdp, checkpointing=True),
    "calibrate": calibrate_apart,
    "merge": merge_sharded,
}


def work(rank: int, meeting: str, results: dict) -> None:
    """In each process, every job: to start a process takes longer than its jobs.

    They meet at a file, because another program may take a port that was free a moment ago.
    """
    address = Path(meeting).as_uri()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    assert dist.get_world_size() == 2
    torch.set_num_threads(1)
    for name, job in JOBS.items():
        results[rank, name] = job(rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What each job returned in each process."""
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(work, args=(str(tmp_path_factory.mktemp("processes") / "meeting"), shared), nprocs=2)
        return dict(shared)


@pytest.mark.parametrize("wrapped", ["ddp", "ddp-checkpointed", "fsdp", "fsdp-checkpointed"])
def test_two_processes_are_one(results: dict, wrapped: str) -> None:
    for rank in range(2):
        errors = results[rank, wrapped]
        assert list(errors) == CASES
        assert max(errors.values()) < 1e-12, errors


def test_statistics_of_several_processes_add_up(results: dict) -> None:
    model = adapted("llama", "middle", 1)
    calibrate(model, [inputs("llama", seed=n) for n in range(4)], lambda m, batch: m(*batch))
    for name, factors in merged_factors(model).items():
        for rank in range(2):
            assert torch.allclose(results[rank, "calibrate"][name], factors.lora_A, atol=1e-12)


def test_a_sharded_adapter_merges_as_a_whole_one(results: dict) -> None:
    for shortcut, num_previous in (("input", 1), ("middle", None)):
        model = adapted("llama", shortcut, num_previous)
        wanted = merge_everything(model, [inputs("llama", seed=n) for n in range(4)])
        assert (wanted["merged"] - wanted["unmerged"]).abs().max() > 1e-6
        for rank in range(2):
            got = results[rank, "merge"][shortcut]
            assert got.keys() == wanted.keys()
            errors = {name: (got[name] - value).abs().max().item() for name, value in wanted.items()}
            assert max(errors.values()) < 1e-10, errors
    assert all("makes wider factors" in results[rank, "merge"]["block"] for rank in range(2))
