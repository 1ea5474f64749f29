"""Forks two gloo processes after one import; run as a script, each runs the same command of bertops."""

import os
import sys
from collections.abc import Callable

import torch

from bertops import cli
from bertops.distill import work  # noqa: F401  (the slow import, once)


def in_two_processes(act: Callable[[], int | None], port: str) -> list[int]:
    """Calls ``act`` in both; their exit statuses, which it returns."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in "01":
        child = os.fork()
        if not child:
            os.environ |= {**shared, "RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": "lo"}
            os._exit(act() or 0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(port: str, arguments: list[str]) -> int:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return max(in_two_processes(lambda: cli.main(arguments), port))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
