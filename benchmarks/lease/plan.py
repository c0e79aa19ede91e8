"""The time planned for each phase of `make gpu`, in the order in which the phases run."""

from typing import NamedTuple

CORES, TOTAL_S = 16, 540.0
SLOWEST = 3.0  # largest factor for few cores, so that time remains for the measurements


class Phase(NamedTuple):
    """seconds: time on a machine with CORES cores. cores: whether fewer cores make the phase longer."""

    name: str
    seconds: float
    cores: bool = False


PHASES = (
    Phase("machine", 10),
    Phase("ceilings", 20),
    Phase("smoke triton", 60, cores=True),
    Phase("build", 35, cores=True),  # runs in the background of the three before; this is the wait after them
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
    """Divides `total` seconds among the phases; with fewer cores than CORES, those limited by cores get more."""
    slower = min(SLOWEST, max(1.0, CORES / cores))
    weights = {phase.name: phase.seconds * (slower if phase.cores else 1) for phase in PHASES}
    scale = min(1.0, total / sum(weights.values()))
    return {name: weight * scale for name, weight in weights.items()}


def ends(parts: dict[str, float]) -> dict[str, float]:
    """When each phase must end, in seconds from the start. A phase that ends early leaves its time to the next."""
    now, found = 0.0, {}
    for name, part in parts.items():
        now += part
        found[name] = now
    return found
