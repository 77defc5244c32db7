"""PowerSGD between real ranks."""

import numpy as np
import pytest
from helpers.powersgd_reference import MATRICES, by_textbook, gradients

from dllm.comm import runtime
from dllm.comm.powersgd import PowerSGD


@pytest.mark.mpi
@pytest.mark.parametrize("oversubscribed", [False, True])
def test_powersgd_over_mpi_equals_the_textbook(oversubscribed):
    comm = runtime.world()
    method, results = PowerSGD(comm, MATRICES, np.float64, 2, oversubscribed=oversubscribed), []
    q = method.q.copy()
    for step in gradients(comm.size, 4):
        results.append(step[comm.rank])
        method.average(results[-1])
    np.testing.assert_allclose(results, by_textbook(comm.size, 2, 4, q), rtol=1e-8, atol=1e-9)
    everyones = comm.allgather(np.array(results).tobytes())
    assert len(set(everyones)) == 1
