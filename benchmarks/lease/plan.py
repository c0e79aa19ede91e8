"""Seconds for each phase of `make gpu`, in the order in which they run."""

from typing import NamedTuple

CORES, TOTAL_S = 16, 540.0
SLOWEST = 3.0  # however few cores there are, something must be measured too


class Phase(NamedTuple):
    """seconds: on CORES cores. cores: whether fewer cores make it longer."""

    name: str
    seconds: float
    cores: bool = False


PHASES = (
    Phase("machine", 10),
    Phase("ceilings", 20),
    Phase("smoke triton", 60, cores=True),
    Phase("build", 35, cores=True),  # it runs beside the three before; so long it is waited for after them
    Phase("smoke cuda", 30, cores=True),
    Phase("tests", 135, cores=True),
    Phase("contrastive", 55),
    Phase("sigmoid", 20),
    Phase("gather", 15),
    Phase("layernorm", 15),
    Phase("mlp", 15),
    Phase("attention", 20),
    Phase("step", 40),
    Phase("tune", 50),
    Phase("ncu", 20),
)


def seconds(total: float = TOTAL_S, cores: int = CORES) -> dict[str, float]:
    """Each phase's part of `total`; with fewer cores than CORES, larger parts for what they bound."""
    slower = min(SLOWEST, max(1.0, CORES / cores))
    weights = {phase.name: phase.seconds * (slower if phase.cores else 1) for phase in PHASES}
    scale = min(1.0, total / sum(weights.values()))
    return {name: weight * scale for name, weight in weights.items()}


def ends(parts: dict[str, float]) -> dict[str, float]:
    """When each phase must be over, in seconds from the start; one that is over early leaves its time to the next."""
    now, found = 0.0, {}
    for name, part in parts.items():
        now += part
        found[name] = now
    return found
