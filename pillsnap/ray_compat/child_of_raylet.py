"""Runs a Python program of Ray that the kernel kills with its raylet: child_of_raylet.py [-s] PROGRAM ARGUMENT...

By themselves, workers were still there 98 s after a SIGKILL of their raylet, and agents after 71 s. The kernel is told
before the program imports anything, which takes seconds.
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, where token.py is not the standard library's
    import ctypes
    import os
    import runpy
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    with open(f"/proc/{os.getppid()}/comm") as name:
        if name.read() != "raylet\n":  # it has ended already
            os._exit(1)
    command = sys.argv[1:]
    if any(word.startswith("--serialized-runtime-env-context=") for word in command):
        program = next(word for word in command if not word.startswith("-"))
        command.insert(0, os.path.join(os.path.dirname(program), "setup_worker.py"))  # starts the program in it
    elif "--language=PYTHON" in command:
        command.remove("--language=PYTHON")  # for setup_worker.py alone
    if command[0].startswith("-"):
        os.execv(sys.executable, [sys.executable, *command])
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
