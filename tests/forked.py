"""Python programs in processes of their own, forked from one that has torch and LeRobot imported.

A test that kills or interrupts a program needs a process, not the ten seconds in which a fresh interpreter imports what
every run imports. `Popen` and `run` are those of `subprocess`, for programs of this interpreter alone: a script, a
console script, ``-m`` and a module, or ``-c`` and some lines. They start, and may be killed, like any other; only the
imports are there already. Environment variables that a library reads as it is imported are those of the tests.

As a script, this is the process that is forked; see `serve`.
"""

import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

IMPORTED = (
    "lerobot.envs.factory",
    "lerobot_policy_flow_mlp.adapter",
    "peft",
    "poco_vla.algorithms.poco",
    "poco_vla.cli.recipes",
    "poco_vla.training.trainer",
    "scipy.stats",
)
"""Imported before a program begins; more would do no harm, and less would only take longer."""


class Popen(subprocess.Popen):
    """`subprocess.Popen` of a Python program, without the start of an interpreter."""

    def _execute_child(self, *arguments):
        """Send the program and its standard streams to the server; all other ways of starting one stay as they are."""
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments
        streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [number if stream == -1 else stream for number, stream in enumerate(streams)]
        words = [os.fspath(word) for word in given["args"]]
        program = {
            "words": words[1:] if words[0] == sys.executable else words,
            "folder": os.fspath(given["cwd"] or Path.cwd()),
            "variables": dict(given["env"] if given["env"] is not None else os.environ),
            "new_session": given["start_new_session"],
        }
        self._state, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server(), [b"."], [*streams, theirs.fileno()])
        self._state.sendall(json.dumps(program).encode() + b"\n")
        self._lines = self._state.makefile()
        self.pid = int(self._lines.readline())
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))

    def _internal_poll(self, *_, **__):
        if self.returncode is None and select.select([self._state], [], [], 0)[0]:
            self._wait(None)
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None:
            if not select.select([self._state], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._state.close()
        return self.returncode


def run(args, *, check=False, timeout=None, **options):
    """`subprocess.run` of a Python program; see `Popen`."""
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


@cache
def server():
    """Return the socket of this process's server, which ends when the socket is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    return ours


# -- the process that is forked ---------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> dict:
    """Return, in a process of its own each time, a program to run; end when nobody can ask any more.

    Between the server and a program stands a process that tells the program's number, waits for it, and tells its exit
    status.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        byte, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
        if not byte:
            sys.exit()
        if os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        *streams, state = descriptors
        told = socket.socket(fileno=state)
        program = json.loads(told.makefile().readline())
        child = os.fork()
        if not child:
            told.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return program
        for stream in streams:
            os.close(stream)
        told.sendall(f"{child}\n".encode())
        told.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)


def begin(program: dict) -> None:
    """Run the program as the interpreter would have."""
    if program["new_session"]:
        os.setsid()
    os.chdir(program["folder"])
    os.environ.clear()
    os.environ.update(program["variables"])
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    script, *words = program["words"]
    if script == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(words[0], main.__dict__)
    elif script == "-m":
        module, *words = words
        sys.path[0] = program["folder"]
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(script).parent)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    begin(serve(socket.socket(fileno=int(sys.argv[1]))))
