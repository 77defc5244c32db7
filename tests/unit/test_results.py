"""What benchmarks say of the machine that they ran on."""

import json
import platform

import pytest

from benchmarks import results
from dllm.kernels import processor

ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\nprocessor\t: 1\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("cpuinfo", "lscpu", "name"),
    [
        ("vendor_id\t: X\nmodel name\t: AMD EPYC\nmodel name\t: another\n", "Model name:  AMD\n", "AMD EPYC"),
        (ARM, "Architecture:  aarch64\nModel name:  Neoverse-N1\nModel:  1\n", "Neoverse-N1"),
        (ARM, "Model name:  -\n", "implementer 0x41, part 0xd0c"),
        (ARM, "", "implementer 0x41, part 0xd0c"),
        ("", "", platform.machine()),
    ],
)
def test_the_processor_is_named(cpuinfo, lscpu, name):
    assert results.processor_name(cpuinfo, lscpu) == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org\n", {"Open MPI": "5.0.11"}),
        ("HYDRA build details:\n    Version:    5.0.2\n    Release Date:  Fri\n", {"MPICH": "5.0.2"}),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005\n", {"Intel MPI": "2021.11"}),
        ("", {}),
    ],
)
def test_mpi_is_named(text, found):
    assert results.mpi_version(text) == found


def test_what_is_saved_names_the_machine_and_what_was_used(tmp_path, capsys):
    table, draw = results.Table("Nothing", [("a", 4)]), lambda axes: axes.plot([], label="a")
    path, *_ = results.save(tmp_path, "nothing", table, {}, draw)
    found = json.loads(path.read_text())["hardware"]
    assert found == results.machine()
    assert found["vector_bytes"] == processor.VECTOR
    assert found["caches"]["L2"] in (0, processor.L2)
    assert found["bf16"] == (processor.BF16 or "fp32")
    assert found["processor"] in results.hardware()
    assert f"Python {platform.python_version()}" in results.hardware()
