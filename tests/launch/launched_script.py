"""A user script for launcher tests: joins the world, adds the ranks up, says what it was given; fails on one rank if asked."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from megatron.errors import ConfigError, exit_on_error
from megatron.launch.environment import close_process_group, init_process_group, read_rank_environment
from megatron.launch.process_exit import leaving

with leaving(), exit_on_error():
    env = read_rank_environment()
    init_process_group(env, "nccl", timeout_s=30)
    total = torch.tensor([float(env.rank + 1)])
    if env.world_size > 1:
        dist.all_reduce(total)
    if os.environ.get("FAIL_RANK") == str(env.rank):
        raise ConfigError("this rank was told to fail")
    if "FAIL_RANK" in os.environ:
        time.sleep(60)
    if env.is_main:
        report = {
            "sum": total.item(),
            "world": env.world_size,
            "args": sys.argv[1:],
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(report), flush=True)
    close_process_group()
