"""A run: its processes and devices, its plan and its folder."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed import is_initialized

from bertops.training.plan import Objective, Plan
from bertops.training.run_folder import RunFolder

KINDS = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)


class Run:
    """Starts ``accelerate`` and opens the folder; a context manager, which closes it.

    Processes and devices are those of ``accelerate``: under ``accelerate launch`` or ``torchrun`` there are
    several, each with a replica of the model or, with ``fsdp``, with its share of what is trained
    (:mod:`bertops.training.sharding`). Results are the same up to rounding, and a run may go on with
    ``fsdp`` that began without it, and the other way round: its checkpoints hold whole tensors.

    Args:
        out: a new or empty folder, or that of this run, which then goes on with as many processes.
        plan: see :class:`bertops.training.Plan`.
        config: what else decides the result (data, sizes), as JSON can hold it.
        cpu: stay on the CPU where there is a GPU.
        fsdp: shard what is trained over the processes; ``accelerate launch --use_fsdp --fsdp_version 2`` asks
            for it too. Of accelerate's options for it, ``fsdp_reshard_after_forward`` counts.

    Raises:
        FileExistsError, BlockingIOError, ValueError: ``out`` holds other things or a run of another
            configuration, or is in use; says which.
        ValueError: ``accelerate`` is set to what the plan or this package decides; or there is one process,
            and ``fsdp`` or the launcher asks for more; says what to do.
    """

    def __init__(
        self,
        out: str | Path,
        plan: Plan,
        config: Mapping[str, Any],
        *,
        cpu: bool = False,
        fsdp: bool = False,
    ) -> None:
        replicas = DistributedDataParallelKwargs(find_unused_parameters=True)
        cpu = cpu or not torch.accelerator.is_available()  # accelerate starts no processes on CPUs unasked
        self.accelerator, self.plan = Accelerator(cpu=cpu, kwargs_handlers=[replicas]), plan
        self.fsdp = fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
        self.reshard_after_forward = True
        check_accelerate(self.accelerator)
        if self.fsdp:
            self.reshard_after_forward = check_fsdp()
        self.main = self.accelerator.is_main_process
        whole = {**config, "plan": asdict(plan), "processes": self.accelerator.num_processes}
        with self.accelerator.main_process_first():
            self.folder = RunFolder(Path(out), whole, writes=self.main)

    def prepare(self, objective: Objective) -> nn.Module:
        """``objective`` on this process's device, as a replica where there are several, or a sharded copy."""
        if not self.fsdp:
            return self.accelerator.prepare(objective)
        from bertops.training.sharding import shard  # slow to import

        device, reshard = self.accelerator.device, self.reshard_after_forward
        return shard(objective, device, reshard_after_forward=reshard)

    def finish(self, objective: Objective, trained: Objective) -> None:
        """Gives ``objective`` what its sharded copy has become; in all processes at once."""
        if self.fsdp:
            from bertops.training.sharding import unshard

            unshard(objective, trained)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.close()


def check_accelerate(accelerator: Accelerator) -> None:
    """Raises ValueError where it is set to anything that the training loop does not do, or does itself."""
    kind, steps = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if kind not in KINDS:
        raise ValueError(
            f"accelerate must run on one device, several CPUs or GPUs, or FSDP, got {kind.value}"
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"accelerate is set to mixed precision {accelerator.mixed_precision}, expected no: the plan "
            "decides that, with bf16"
        )
    if steps != 1:
        raise ValueError(
            f"accelerate is set to {steps} gradient accumulation steps, expected 1: the plan decides that, "
            "with accumulation"
        )
    # accelerate's launcher gives the address to processes that it leaves to MPI to start
    started_alone = "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ
    if accelerator.num_processes == 1 and started_alone and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch --cpu starts one process whatever --num_processes says, unless under MPI: "
            "take torchrun, or accelerate launch --multi_gpu with --cpu given to bertops"
        )


def check_fsdp() -> bool:
    """Whether layers are resharded after their forward.

    Raises:
        ValueError: there are no processes to shard over, or accelerate asks for what there is not.
    """
    if not is_initialized():
        raise ValueError(
            "fsdp shards over processes, and there is one: start them with torchrun or accelerate launch"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return True
    from torch.distributed.fsdp import CPUOffloadPolicy  # slow to import

    asked = FullyShardedDataParallelPlugin()  # from what accelerate launch has set
    if asked.fsdp_version != 2:
        raise ValueError(
            f"accelerate is set to FSDP version {asked.fsdp_version}, expected 2: --fsdp_version 2"
        )
    if asked.activation_checkpointing or isinstance(asked.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "accelerate is set to FSDP's activation checkpointing or CPU offload: there is neither"
        )
    return bool(asked.reshard_after_forward)
