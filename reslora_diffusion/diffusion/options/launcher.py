"""The launcher's settings in the environment: number of processes and configuration. This module needs no torch."""

import os
from collections.abc import Iterator, Mapping

from . import DreamBoothOptions

PRECISIONS = ("no", "fp16", "bf16")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate looks for them


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    return next((int(environment[name]) for name in WORLD_SIZES if int(environment.get(name, 0)) > 0), 1)


def started_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether `accelerate launch` was asked for several processes and started one.

    It does so with `--cpu`, and wherever neither `--multi_gpu` nor its configuration says how to start several. Asked
    for more than one it says where they would meet (`MASTER_ADDR`), and then numbers none of them (`RANK`).
    """
    by_accelerate = "ACCELERATE_DYNAMO_MODE" in environment
    return by_accelerate and "MASTER_ADDR" in environment and "RANK" not in environment and world_size(environment) == 1


def processes(count: int) -> list[str]:
    """Lines on who trains."""
    if count > 1:
        return [f"{count} processes"]
    if not started_alone():
        return ["1 process"]
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    before = "ACCELERATE_USE_CPU=1 " if on_cpu else ""
    return [
        "1 process trains: accelerate launch was asked for several, and without --multi_gpu it starts one"
        f"{' (with --cpu always)' if on_cpu else ''}; for two, call "
        f"`{before}accelerate launch --multi_gpu --num_processes 2 ...`"
    ]


def shards() -> bool:
    """Return whether `accelerate launch` was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launcher_problems(options: DreamBoothOptions) -> Iterator[str]:
    """Yield the settings of a launcher that this training does not support."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if options.mixed_precision is None and precision not in PRECISIONS:
        yield f"--mixed_precision: accelerate launch was given {precision!r}, wanted {', '.join(PRECISIONS)}"
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        yield "DeepSpeed ZeRO-3 would take the frozen base apart; wanted zero_stage 2, or FSDP 2 to shard the base"
    if not shards():
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        yield f"FSDP {version} wants one precision for base and adapters; wanted fsdp_version: 2"
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        yield (
            "fsdp_cpu_ram_efficient_loading leaves every process but the first without the text encoders' weights; "
            "wanted false, as in train_scripts/configs/accelerate/fsdp2.yaml"
        )
    if options.aspect_ratio_buckets and options.with_prior_preservation:
        yield "--aspect_ratio_buckets with --with_prior_preservation gives processes unequal batches; FSDP cannot wait"
    if options.cuda_graph:
        yield "--cuda_graph cannot record how FSDP gathers the base; wanted one or the other"
    if options.merge_method == "paper_weight":
        yield "--merge_method paper_weight reads whole weights of the base, which FSDP shards"
