"""How the threads of torch's CPU ops wait for each other: the default of the command line."""

import os

# libgomp's threads wait busily before they sleep, by default 300,000 rounds: 23 ms at the 75 ns of a round on an AMD
# EPYC of 2024. Where another process uses one of their cores, they hold the core that the thread they wait for needs;
# where they sleep at once, each of the many barriers of a step costs a wake-up. A step of the demo, alone and with a
# busy process on the same two cores: 160 and 500 ms by default, 180 and 290 without busy waiting, 160 and 320 with
# 2,000 rounds. `python -m benchmarks train --part waiting` measures it.
SPINS = 2000


def wait_briefly() -> None:
    """Limits how long OpenMP's threads wait busily, unless the environment has a setting of that already.

    libgomp, the OpenMP of torch's Linux wheels, reads the environment once, when it is loaded: call this before torch
    is imported. Child processes inherit the setting.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
