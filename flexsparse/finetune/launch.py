"""What accelerate gives a run: its processes, device and precision; and doing things in all processes or in none."""

from collections.abc import Callable
from typing import Any

import torch

from flexsparse.finetune.settings import Options, Settings
from flexsparse.training.environment import check_device
from flexsparse.training.errors import RunError


def make_accelerator(settings: Settings, options: Options) -> Any:
    """The Accelerator of this process.

    Raises:
        RunError: a configuration of accelerate that does not go with this recipe, or a batch that does not divide.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, DynamoBackend

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    check_device(options.device)
    try:
        accelerator = Accelerator(
            cpu=options.device == "cpu" or not torch.accelerator.is_available(),
            mixed_precision="bf16" if settings.bf16 else "no",
            log_with="tensorboard",
            project_dir=str(options.folder),
        )
    except ValueError as error:  # its state is global to a process
        raise RunError(f"accelerate refuses: {' '.join(str(error).split())}") from error
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RunError(f"accelerate's configuration asks for {kind.value}: use FSDP2 or DDP instead")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("accelerate's fsdp_version is 1: set fsdp_version: 2 in its configuration")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise RunError(
            "accelerate's fsdp_cpu_ram_efficient_loading is true, which fails on parameters that a model holds itself, such as "
            "Wan's scale_shift_table: set it to false"
        )
    if accelerator.is_fsdp2 and options.compile == "whole":
        raise RunError(
            "--compile 'whole' with FSDP2, whose hooks break the graph at each block: pass --compile regional"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise RunError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}: set it to 1; --batch and "
            "--micro-batch decide"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise RunError("accelerate's dynamo_backend is set: set it to 'no'; --compile decides")
    each = options.micro_batch * accelerator.num_processes
    if settings.batch % each:
        raise RunError(
            f"--batch {settings.batch} is no multiple of {each} (--micro-batch {options.micro_batch} on "
            f"{accelerator.num_processes} processes): pass one"
        )
    return accelerator


def together(accelerator: Any, work: Callable[[], object], here: bool = True) -> None:
    """Does something in every process; where it fails in one, all end instead of waiting for it.

    Args:
        accelerator: of this process.
        work: what to do.
        here: whether this process does it, or only hears of it.

    Raises:
        RunError: it failed here, or elsewhere.
    """
    error: RunError | None = None
    try:
        if here:
            work()
    except RunError as raised:
        error = raised
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), reduction="sum")
    if error is not None:
        raise error
    if float(failed) > 0:
        raise RunError("another process cannot go on: see its message")
