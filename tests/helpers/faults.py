"""Faults put into a job from outside: code that runs in every process right after a module of dllm was imported.

The code sees the module's own names, `rank`, and `once(name)`, which is true the first time that any process asks.
Each function returns the variables of such a job. Steps and checkpoints are reached by the hooks that dllm offers for it.
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


def in_each_step(folder, what, *, when="True", also=""):
    """Run statements before each step of training; they know `trainer` and `rank`.

    when : a condition of the process, such as a variable of its environment
    also : code to run before, once
    """
    statements = textwrap.indent(textwrap.dedent(what).strip(), "    ")
    hook = f"def hook(trainer):\n{statements}\nif {when}:\n    module.Trainer.before_step.append(hook)\n"
    return fault(folder, "dllm.training.trainer", textwrap.dedent(also) + hook)


def slow_steps(folder, seconds, *, after=0, when="True", also=""):
    """A nap before each step from number `after` on."""
    return in_each_step(folder, f"time.sleep({seconds} if trainer.state.step >= {after} else 0)", when=when, also=also)


def at_stage(folder, what, *, step, stage, also=""):
    """Run an expression when a checkpoint of a step reaches a stage: begin, piece (of its data), end."""
    hook = f"lambda saver, stage: ({what}) if saver.step == {step} and stage == {stage!r} else None"
    return fault(folder, "dllm.runs.checkpoint_writer", f"{textwrap.dedent(also)}\nmodule.Saver.on_stage.append({hook})\n")


def _killer(rank):
    return f"""
import signal
def die():
    if rank == {rank} and once("died"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_at_stage(folder, *, rank, step, stage):
    """SIGKILL to a rank at a stage of a checkpoint, once."""
    return at_stage(folder, "die()", step=step, stage=stage, also=_killer(rank))


def kill_at_rename(folder, *, rank, path, after=False):
    """SIGKILL to a rank before it renames a file to a path that holds these words, or right after it; once."""
    calls = ("before(one, other)", f"die() if {path!r} in str(other) else None")
    code = f"""
def replace(one, other, before=os.replace):
    {calls[0 if after else 1]}
    {calls[1 if after else 0]}
os.replace = replace
"""
    return fault(folder, "dllm.runs.checkpoint_writer", _killer(rank) + code)
