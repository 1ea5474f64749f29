"""A run: its processes and devices, its plan and its folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from bertops.training.plan import Plan
from bertops.training.run_folder import RunFolder

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Run:
    """Starts ``accelerate`` and opens the folder; a context manager, which closes it.

    Processes and devices are those of ``accelerate``: under ``accelerate launch`` or ``torchrun`` there are
    several, each with a replica of the model.

    Args:
        out: a new or empty folder, or that of this run, which then goes on.
        plan: see :class:`bertops.training.Plan`.
        config: what else decides the result (data, sizes), as JSON can hold it.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        FileExistsError, BlockingIOError, ValueError: ``out`` holds other things or a run of another
            configuration, or is in use; says which.
        NotImplementedError: ``accelerate`` is set to shard the model.
    """

    def __init__(self, out: str | Path, plan: Plan, config: Mapping[str, Any], *, cpu: bool = False) -> None:
        replicas = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator, self.plan = Accelerator(cpu=cpu, kwargs_handlers=[replicas]), plan
        if self.accelerator.distributed_type not in REPLICATED:
            raise NotImplementedError(f"no sharding of models: {self.accelerator.distributed_type}")
        self.main = self.accelerator.is_main_process
        whole = {**config, "plan": asdict(plan), "processes": self.accelerator.num_processes}
        with self.accelerator.main_process_first():
            self.folder = RunFolder(Path(out), whole, writes=self.main)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.close()
