"""Small programs that must import peft or diffusers anew. Each is a fork of one process, which every worker of the
suite has: it has imported torch and transformers, what takes longest, and nothing of ours, PEFT's or diffusers'."""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM, CLIPTextModel, CLIPTokenizer, LlamaForCausalLM
assert not {"peft", "diffusers", "reslora_diffusion"} & sys.modules.keys()
for line in sys.stdin:
    code, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
        status = 0
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen:
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
    atexit.register(process.communicate)  # it ends when its input does
    return process


def run_forked(code: str) -> subprocess.CompletedProcess[str]:
    """What `python -c code` returns and says, in the folder `/`; on Windows, which has no fork, it is that."""
    if sys.platform == "win32":
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        process.stdin.write(json.dumps((code, folder)) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        stdout, stderr = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(["-c", code], status, stdout, stderr)
