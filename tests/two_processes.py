"""Runs one command of bertops in two gloo processes, forked after one import; for test_distill_text.py."""

import os
import sys

import torch

from bertops import cli
from bertops.distill import work  # noqa: F401  (the slow import, once)


def main(port: str, arguments: list[str]) -> int:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in "01":
        child = os.fork()
        if not child:
            os.environ |= {**shared, "RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": "lo"}
            os._exit(cli.main(arguments))
        children.append(child)
    return max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
