"""How the threads of torch's CPU ops wait for each other: the default of the command line."""

import os

# libgomp's threads wait busily before they sleep, by default 300,000 rounds: 23 ms at the 75 ns of a round on an AMD
# EPYC of 2024. Where another process uses one of their cores, they then hold the core that the thread they wait for
# needs. Sleeping at once costs a wake-up at each of the thousands of barriers of a step. 2,000 rounds are about as long
# as that costs.
# benchmarks/bench_train.py measures both.
SPINS = 2000


def wait_briefly() -> None:
    """Limits how long OpenMP's threads wait busily, unless the environment has a setting of that already.

    libgomp, the OpenMP of torch's Linux wheels, reads the environment once, when it is loaded: call this before torch
    is imported. Child processes inherit the setting.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
