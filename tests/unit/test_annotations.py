"""Whatever is public in dllm says what it is and what it takes: a docstring, and a type for every parameter and result.

A method that a base class has explained needs no docstring of its own.
"""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted([*(path for path in ROOT.glob("dllm/**/*.py") if path.parent.name != "kernels"), *ROOT.glob("kernels/*.py")])
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
UNTYPED = {"intrinsic"}  # decorators of functions that get Numba's and LLVM's own objects instead of values
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def decorators(node):
    """Names of a function's or class's decorators, without modules and arguments."""
    calls = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return {one.attr if isinstance(one, ast.Attribute) else one.id for one in calls}


def public(tree):
    """(name, node) of the classes and functions of a file, and the methods of these classes, that others may use.

    Constructors are among them. Functions within functions are not, nor is anything of a private class.
    """
    for node in tree.body:
        if isinstance(node, FUNCTIONS | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, FUNCTIONS | ast.ClassDef) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    yield f"{node.name}.{inner.name}", inner


def untyped(node, method):
    """Names of the parameters of a function that have no type, and "return"."""
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args]
    if method and "staticmethod" not in decorators(node):
        parameters = parameters[1:]
    parameters += [*arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
    return [one.arg for one in parameters if one.annotation is None] + ["return"] * (node.returns is None)


@functools.cache
def classes():
    """Name of a class of dllm -> names of its bases, names of its methods with a docstring."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases, methods = found.setdefault(node.name, (set(), set()))
                add_class(node, bases, methods)
    return found


def add_class(node, bases, methods):
    """Add the names of a class's bases, and of its methods that have a docstring."""
    plain = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]  # of a generic class
    bases |= {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in plain}
    methods |= {one.name for one in node.body if isinstance(one, FUNCTIONS) and ast.get_docstring(one)}


def explained(node, method, known):
    """Whether a base class of the class `node`, one of `known`, has a docstring for a method."""
    bases, seen = set(), set()
    add_class(node, bases, set())
    while bases - seen:
        base = (bases - seen).pop()
        seen.add(base)
        more, methods = known.get(base, (set(), set()))
        if method in methods:
            return True
        bases |= more
    return False


def faults(source, known):
    """What is missing in a file, a line each. known: `classes`, where bases are looked for."""
    tree = ast.parse(source)
    above = {inner: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for inner in node.body}
    if not ast.get_docstring(tree):
        yield "the file has no docstring"
    for name, node in public(tree):
        marks = decorators(node)
        silent = node.name == "__init__" or "setter" in marks or (node in above and explained(above[node], node.name, known))
        if not (silent or ast.get_docstring(node)):
            yield f"{name} has no docstring"
        if isinstance(node, ast.ClassDef) or marks & UNTYPED:
            continue
        if missing := untyped(node, "." in name):
            yield f"{name} has no type for {', '.join(missing)}"
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            yield f"{ast.unparse(node.targets[0])} is a lambda with a name: write a function"


def test_what_is_missing_is_found():
    source = """
class A:
    def __init__(self, x): ...
    def b(self, *y: int, z) -> int: ...
    @staticmethod
    def c(x: int) -> int: "It."
    def _d(x): ...
class B(A, x.C):
    "It."
    def e(self) -> None: ...
    def g(self) -> None: ...
    def c(self) -> None: ...
@a.intrinsic
def f(x): "It."
def _g(x): ...
async def h(**x): "It."
i = lambda: 0
"""
    assert list(faults(source, {"A": ({"D"}, {"c"}), "C": (set(), set()), "D": ({"A"}, {"g"})})) == [
        "the file has no docstring",
        "A has no docstring",
        "A.__init__ has no type for x, return",
        "A.b has no docstring",
        "A.b has no type for z",
        "B.e has no docstring",
        "h has no type for x, return",
        "i is a lambda with a name: write a function",
    ]


@EVERY_FILE
def test_what_is_public_has_types_and_says_what_it_is(path):
    assert list(faults(path.read_text(encoding="utf-8"), classes())) == []
