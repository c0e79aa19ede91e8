"""docs/vit.md: runs its blocks of Python, each unchanged and alone."""

import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "vit.md"


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    ops, levels, compiled = ({} for _ in range(3))
    for block, names in zip(blocks, (ops, levels, compiled), strict=True):
        exec(compile(block, str(DOC), "exec"), names)
    assert ops["y"].shape == ops["z"].shape == (2, 197, 192)
    assert ops["out"].shape == (2, 197, 3, 64)
    assert compiled["features"].shape == (2, 192)
    kept = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(kept) == 4
    # 9, 5, 2 and 1 times 768 bfloat16 per token and layer, for 12 layers, 197 tokens, 256 images; and a few statistics.
    widths = [gib * 2**30 / (256 * 197 * 12 * 768 * 2) for gib in kept]
    assert all(abs(got - want) < 0.05 for got, want in zip(widths, (9, 5, 2, 1), strict=True)), widths
