"""
Scripts as processes of their own, without the ten seconds in which Python loads torch and transformers.

A server process loads both once; every process is forked from it and then does what `python SCRIPT FLAGS`
does. It can be killed, and two of them train together as torchrun's would.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPO / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["processes_preload"])


def as_script(words, folder, variables, out, err):
    """In the new process: become `python SCRIPT FLAGS` with these environment variables and files."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ |= variables
    os.chdir(folder)
    sys.argv = list(words)
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


class Script:
    """A script that runs; `cwd` and further environment variables as for subprocess."""

    def __init__(self, script, *flags, cwd=None, **variables):
        folder = tempfile.mkdtemp()
        self.out, self.err = Path(folder, "out"), Path(folder, "err")
        words = [str(REPO / script), *map(str, flags)]
        arguments = (words, str(cwd or os.getcwd()), variables, str(self.out), str(self.err))
        self.process = FORKS.Process(target=as_script, args=arguments)
        self.process.start()

    def poll(self):
        """The exit status, None while it runs."""
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def wait(self, seconds=300):
        """The exit status, the negative signal after a kill; (status, standard output, standard error)."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"it stands still: {self.err.read_text()[-2000:]}")
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


def start_one(script, *flags):
    return [Script(script, *flags)]


def start_two(script, *flags):
    """Two processes that train together, with the variables that torchrun sets; returns both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [Script(script, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]


def two_processes(script, *flags):
    """A run of two processes; returns what both printed."""
    runs = [run.wait() for run in start_two(script, *flags)]
    assert [status for status, _, _ in runs] == [0, 0], runs[0][2][-3000:]
    return "".join(printed for _, printed, _ in runs)


def kill_when(ready, runs):
    """Kill -9 processes as soon as ready() holds."""
    while runs[0].poll() is None and not ready():
        time.sleep(0.001)
    for run in runs:
        run.kill()
    assert [run.wait()[0] for run in runs] == [-signal.SIGKILL] * len(runs), "it ended before"
