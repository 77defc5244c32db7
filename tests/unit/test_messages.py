"""Messages between ranks: what is said is what is heard, all else is refused; who says what stands in the documentation."""

import ast
import dataclasses
import pathlib
import pickle
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_one_door import modules

from dllm.comm.messages import pack, unpack
from dllm.errors import UserError

FEW = settings(max_examples=300, deadline=None, derandomize=True, database=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
DTYPES = st.sampled_from(["u1", "i4", "i8", "f4", "f8", "b1", "u2"])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


class Named(NamedTuple):
    number: int
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    run: str
    token: str


@FEW
@given(st.integers(-(2**63), 2**63 - 1), TEXT, st.floats(allow_nan=False, allow_infinity=False), arrays.arrays(DTYPES, SHAPES))
def test_what_is_said_is_what_is_heard(number, text, real, array):
    value = (number, {text: [real, None]}, [Named(3, array), Named(4, array.T)], Pair(text, "t"))
    kind = tuple[int, dict[str, list[float | None]], list[Named], Pair]
    found = unpack(pack(value), kind)
    assert found[:2] == value[:2]
    assert found[3] == value[3]
    for given_back, (_, wanted) in zip(found[2], value[2], strict=True):
        assert given_back.values.dtype == wanted.dtype
        assert np.array_equal(given_back.values, wanted, equal_nan=wanted.dtype.kind == "f")
        assert given_back.values.flags.writeable


def test_numbers_stay_names_of_a_dict():
    assert unpack(pack({3: 0.5}), dict[int, float]) == {3: 0.5}


@pytest.mark.parametrize("kind", [int, str, list[str], dict[str, int], np.ndarray, tuple[int, np.ndarray], Pair, Any])
@FEW
@given(data=st.data())
def test_any_bytes_are_a_value_of_the_kind_or_a_value_error(kind, data):
    whole = pack((1, np.arange(3.0))) if data.draw(st.booleans()) else pack(["a", {"b": 1}])
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    message = data.draw(st.sampled_from([bytes(damaged), bytes(damaged[: len(whole) // 2])]) | st.binary(max_size=40))
    problem = ""
    try:
        unpack(message, kind)
    except ValueError as error:
        problem = str(error)
    assert re.fullmatch("(not a message of the kind that was expected: .+)?", problem)


@pytest.mark.parametrize(
    "place",
    [
        [0, "O", [1]], [0, "<f8", [2**40]], [0, "<f8", [-1]], [-8, "<f8", [1]], [9, "<f8", [1]], [0, "<f8,<f8", [1]],
        [0, "V8", [1]], [0, "S8", [1]], [0, "<M8[s]", [1]], [0, "<c16", [1]], [0, "<f8", [1] * 100], [2**70, "<f8", []],
        [0, "(1,f8", [1]], [0, ">f8", [1]], [0, "\0", [1]], [0, "f8", [1]],
        [0, "x(", [1]], [0, "<f8", 1], [0, "<f8"], {"at": 0}, None, [0, "<f8", [2**62, 2**62]],
    ],
)  # fmt: skip
def test_an_array_that_is_not_there_is_refused(place):
    with pytest.raises(ValueError, match="not a message"):
        unpack(pack(place) + bytes(8), np.ndarray)


def test_arrays_in_one_place_take_no_more_memory_than_the_message():
    one = pack([np.zeros(1000), np.ones(1000)])
    assert [array.sum() for array in unpack(one, list[np.ndarray])] == [0, 1000]
    with pytest.raises(ValueError, match="overlap"):
        unpack(pack([[0, "<f8", [1000]]] * 3) + bytes(16_000), list[np.ndarray])


@pytest.mark.parametrize("message", [pickle.dumps([1]), b"[" * 10**6, (10**6).to_bytes(8, "little") + b"[" * 10**6, b""])
def test_what_is_no_message_is_refused(message):
    with pytest.raises(ValueError, match="not a message"):
        unpack(message, Any)


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, {"x": {"y": object()}}])
def test_what_cannot_be_said_is_an_error_at_home(value):
    if value == {1, 2}:
        assert unpack(pack(value), list[int]) == [1, 2]  # a list
        return
    with pytest.raises(TypeError):
        pack(value)


def test_a_name_that_is_not_utf_8_is_refused():
    with pytest.raises(UserError, match="is not UTF-8"):
        pack("runs/\udcff")


GIVES_TO_MPI = re.compile(
    "I?[brs]?send|I?(all)?(reduce|gatherv?)|I?bcast|Ineighbor_.*|I?alltoall.*|Accumulate|Put|Iagree", re.I
)
COMMUNICATORS = {"comm", "node", "group", "peers", "nodes", "graph", "local", "world", "node_comm", "new", "COMM_WORLD"}


def calls(tree):
    """(receiver or None, name) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            receiver = getattr(node.func, "value", None)
            yield getattr(receiver, "attr", getattr(receiver, "id", None)), name


def test_ranks_send_each_other_nothing_that_mpi4py_would_pickle():
    pickling = re.compile(r"i?(b|s|r)?send|i?m?recv|(i?)(all)?(reduce|gather|toall)|i?(bcast|scatter|scan|exscan)|sendrecv")
    benchmarks = pathlib.Path(__file__).parents[2] / "benchmarks"
    measured = [(f"benchmarks/{path.name}", ast.parse(path.read_text())) for path in benchmarks.glob("*.py")]
    for name, tree in [*modules(), *measured]:
        found = [call for call in calls(tree) if call[0] in COMMUNICATORS and pickling.fullmatch(call[1])]
        assert not found, (name, found)
        assert "MPI.pickle" not in ast.unparse(tree), name


def test_the_page_on_privacy_names_every_file_that_gives_something_to_mpi():
    page = (pathlib.Path(__file__).parents[2] / "docs/explanation/privacy.md").read_text()
    listed = set(re.findall(r"`([\w/]+\.py)`", page))
    said = {"allgather", "gather", "broadcast", "total", "largest", "check_same"}
    for name, tree in modules():
        imported_names = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(("messages", "runtime"))
            for alias in node.names
        }
        gives = [
            call
            for receiver, call in calls(tree)
            if (receiver is not None and call[:1].isupper() and GIVES_TO_MPI.fullmatch(call))
            or (receiver in ("messages", "runtime") and call in said)
            or (receiver is None and call in said & imported_names)
        ]
        assert not gives or name in listed, f"{name} calls {gives}: docs/explanation/privacy.md must say what that tells"
    files = {name for name, _ in modules()}
    assert listed <= files, listed - files
