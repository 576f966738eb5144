"""Python programs in processes of their own that start at once: forks of a process that has imported the libraries.

Importing torch takes two seconds of a core, torch._dynamo, which every optimizer imports, two more, and scikit-learn
one; a fork takes a few hundredths. The process that is forked has imported no file of this repository.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "sklearn.datasets"])


def run(command, folder, env, files):
    """In the fork: become `python COMMAND`, in that folder and with that environment. Standard output, error: files."""
    import torch

    torch.set_num_threads(1)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    script, *sys.argv[1:] = command
    ours = {"", str(ROOT), str(ROOT / "tests")}
    installed = [*filter(None, env.get("PYTHONPATH", "").split(":")), *(p for p in sys.path if p not in ours)]
    if script == "-c":
        sys.argv[:2] = ["-c"]
        sys.path[:] = [os.getcwd(), *installed]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[0] = script
        sys.path[:] = [str(Path(script).resolve().parent), *installed]
        runpy.run_path(script, run_name="__main__")


class Program:
    """A started program. Its standard error comes with its standard output if `together`, as in a terminal."""

    def __init__(self, *command, folder=ROOT, env=None, together=False):
        self.written = tempfile.TemporaryDirectory()
        self.files = [Path(self.written.name, name) for name in ("out", "out" if together else "error")]
        env = dict(os.environ if env is None else env)
        self.process = forks.Process(target=run, args=(command, folder, env, self.files))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def end(self, timeout=300):
        """Wait for its end: its exit code and outputs."""
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise TimeoutError
        return subprocess.CompletedProcess([], self.poll(), *(file.read_text() for file in self.files))
