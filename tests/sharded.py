"""torchrun sharded.py SCRIPT ARGUMENTS: run a program with its weights sharded over CPU processes.

accelerate shards over GPUs only. Told that gloo processes are GPUs, it does all that it does there.
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
