"""Numbers as text for people: thin spaces between thousands, units, and a dash for a number that is missing."""

import math
from collections.abc import Sequence

DASH = "–"
THIN = "\u202f"  # narrow no-break space: 12 000
HARD = "\u00a0"  # no-break space: 22.3 %

# Kind of quantity -> its units from small to large, each with its size in the unit that values are given in.
UNITS = {
    "flops": [(10.0**e, u) for e, u in ((0, "FLOP"), (3, "kFLOP"), (6, "MFLOP"), (9, "GFLOP"), (12, "TFLOP"))],
    "bytes": [(1024.0**e, u) for e, u in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))],
    "ms": [(1e-3, "µs"), (1.0, "ms"), (1e3, "s")],
    "s": [(1.0, "s")],
}


def fixed(value: float, decimals: int) -> str:
    """A number with as many decimals as given."""
    return f"{value:,.{decimals}f}".replace(",", THIN).replace("-", "−")


def integer(n: int | None) -> str:
    return DASH if n is None else f"{n:,}".replace(",", THIN)


def significant(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, never an exponent."""
    if value is None:
        return DASH
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return fixed(value, max(0, digits - 1 - exponent))


def unit_for(largest: float, kind: str) -> tuple[float, str]:
    """Size and name of the largest unit of `kind` in which `largest` is at least one."""
    return next((unit for unit in reversed(UNITS[kind]) if abs(largest) >= unit[0]), UNITS[kind][0])


def amount(value: float | None, kind: str) -> str:
    """A value with its unit. kind: "share" (a fraction, shown in per cent) or a key of UNITS."""
    if value is None:
        return DASH
    if kind == "share":
        return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f}{HARD}%"
    size, unit = unit_for(value, kind)
    return f"{significant(value / size)}{HARD}{unit}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent without the sign, which the table's head has."""
    return DASH if share is None else fixed(100 * share, digits)


def saving(share: float | None) -> str:
    """The fraction of a cost that is saved: "22.3 % less", or "12.3 % more" where it is negative."""
    if share is None:
        return DASH
    digits = 3 if 0.9995 <= share < 1 else 1  # "100.0 % less" only where nothing is left of the cost
    return f"{abs(100 * share):.{digits}f}{HARD}% {'less' if share >= 0 else 'more'}"


def points(ours: float | None, theirs: float | None) -> str:
    """The difference of two shares in percentage points, with its sign."""
    if ours is None or theirs is None:
        return DASH
    return f"{100 * (ours - theirs):+.1f}".replace("-", "−")


def joined(parts: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
