"""Runs a Python program of Ray that the kernel kills with its raylet: child_of_raylet.py [-s] PROGRAM ARGUMENT...

By themselves, workers were still there 98 s after a SIGKILL of their raylet, and agents after 71 s. The kernel is told
before the program imports anything, which takes seconds.
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, where token.py is not the standard library's
    import ctypes
    import gc
    import json
    import os
    import runpy
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    with open(f"/proc/{os.getppid()}/comm") as name:
        if name.read() != "raylet\n":  # it has ended already
            os._exit(1)
    gc.set_threshold(10_000)  # instead of 700: a start is imports, which make many objects and few cycles
    option, language = "--serialized-runtime-env-context=", "--language=PYTHON"
    contexts = [json.loads(word.removeprefix(option)) for word in sys.argv if word.startswith(option)]
    command = [word for word in sys.argv[1:] if not word.startswith(option) and word != language]
    for context in contexts:  # one at most
        variables = context.pop("env_vars", {})
        interpreter = context.pop("py_executable", sys.executable)
        if (
            interpreter == sys.executable
            and not any(context.values())
            and all(key.startswith("RAY_") and "$" not in value for key, value in variables.items())
        ):
            os.environ.update(variables)  # as setup_worker.py does, which imports Ray for it: half a second
        else:
            program = next(word for word in command if not word.startswith("-"))
            command = [os.path.join(os.path.dirname(program), "setup_worker.py"), *sys.argv[1:]]
    if command[0].startswith("-"):
        os.execv(sys.executable, [sys.executable, *command])
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
