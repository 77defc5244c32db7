"""What `warm_up` of a file of kernels compiles is what is used of it: in a process of its own, where nothing else has."""

import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]
USES = {  # file of kernels -> code that uses it, with arrays as a model has them
    "attention": "import test_attention as t; shape = (5, 9, 3, 40, 50); inputs, dc, dA, _ = t.arrays(shape, np.float32); "
    "t.attended(**inputs, lengths=[9, 0, 4], dc=dc, dA=dA); "
    "t.test_rows_that_share_a_memory_have_what_lanes_of_their_own_have(np.float32)",
    "copying": "import test_copying as t; lengths = [5, 0, 3]; *inputs, _ = t.arrays(4, 5, 3, 4, lengths, np.float32); "
    "A, tokens, targets, loss, z = inputs; t.mixed(A, tokens, targets, lengths, loss, z); "
    "t.test_distributions_add_up_to_one_and_give_targets_what_the_loss_gives_them(np.float32)",
    "dense": "import test_dense as t; t.test_tanh_and_its_gradient_equal_their_references(np.float32, (3, 40)); "
    "t.test_rows_beside_a_part_of_panels_are_not_touched(np.float32)",
    "panel_rows": "import test_reverse as t; t.test_rows_are_taken_and_put_and_others_are_not_touched(np.float32)",
    "pool": "import test_pool as t; x, dy, _ = t.arrays(4, 3, 32, np.float32); t.pooled(x, [4, 0, 2], 'max', 1, dy)",
    "reverse": "import test_reverse as t; t.turned(np.ones((4, 3, 40), np.float32), np.array([4, 0, 2]))",
    "smoothing": "import test_softmax as t; arrays, targets, _ = t.softmax_arrays(12, 11, 7, np.float32, 1); "
    "t.softmax_compiled(5, **arrays, targets=targets, scale=0.37, smoothing=0.1)",
}
COUNT = "{name: len(found.signatures) for name, found in vars(kernels).items() if hasattr(found, 'py_func')}"


def test_what_is_used_has_been_compiled_before():
    """All files in one process, each first warmed up and then used."""
    lines = ["import numpy as np", "import sys", f"sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'unit')!r}]"]
    for name, use in USES.items():
        lines += [
            f"from dllm.kernels import {name} as kernels", "kernels.warm_up(np.float32)", f"before = {COUNT}",
            use, f"print({name!r}, before == {COUNT}, before, {COUNT})",
        ]  # fmt: skip
    source = "\n".join(lines)
    run = subprocess.run([sys.executable, "-c", source], cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = [line.split()[:2] for line in run.stdout.splitlines()]
    assert found == [[name, "True"] for name in USES], run.stdout
