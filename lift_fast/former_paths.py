"""Modules that have moved: until 0.2 an import by the path of 0.1 warns and gives the module."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "lift_fast.codecs": "lift_fast.ops.rows.codecs",
    "lift_fast.data.openmoji": "lift_fast.demo.openmoji",
    "lift_fast.data.pictures": "lift_fast.data.images",
    "lift_fast.data.scenes": "lift_fast.demo.scenes",
    "lift_fast.quantized": "lift_fast.ops.rows.quantized",
    "lift_fast.ops.contrastive": "lift_fast.ops.pairs.contrastive",
    "lift_fast.ops.cosine": "lift_fast.ops.pairs.cosine",
    "lift_fast.ops.dequant": "lift_fast.ops.rows.dequant",
    "lift_fast.ops.float8": "lift_fast.ops.transformer.float8",
    "lift_fast.ops.layernorm": "lift_fast.ops.transformer.layernorm",
    "lift_fast.ops.linear": "lift_fast.ops.transformer.linear",
    "lift_fast.ops.mlp": "lift_fast.ops.transformer.mlp",
    "lift_fast.ops.sigmoid": "lift_fast.ops.pairs.sigmoid",
    "lift_fast.ops.table": "lift_fast.ops.rows.table",
    "lift_fast.train.checkpoint": "lift_fast.run_folder",
}


class Finder:
    """Finds and loads the modules of MOVED, after Python's own finders have not.

    Without the base classes of importlib.abc, whose import takes 40 ms.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Python makes an empty module, which exec_module replaces."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} has moved to {MOVED[name]}; import it from there", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(MOVED[name])


sys.meta_path.append(Finder())
