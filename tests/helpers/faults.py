"""Faults put into a job from outside: code that runs in every process right after a module of dllm was imported.

The code sees the module's own names, `rank`, and `once(name)`, which is true the first time that any process asks.
"""

import textwrap

HOOK = """
import importlib.abc, importlib.util, os, pathlib, sys, time

def once(name):
    try:
        pathlib.Path({folder!r}, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or 0)
            exec({code!r}, module.__dict__ | {{"module": module, "rank": rank, "once": once, "os": os, "time": time}})
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def fault(folder, module, code):
    """Variables for a job whose processes run `code` when they have imported `module`."""
    home = folder / "fault"
    home.mkdir(exist_ok=True)
    text = HOOK.format(folder=str(home), module=module, code=textwrap.dedent(code))
    (home / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": home}
