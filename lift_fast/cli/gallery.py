"""lift-fast gallery."""

import dataclasses
import webbrowser
from dataclasses import dataclass
from typing import Annotated

import tyro

from ..data.options import DataOptions
from ..errors import ConfigError
from .common import counted, listed, print_problems, say
from .evaluate import NamedSets
from .use import print_code


@dataclass(frozen=True)
class Gallery:
    """Browse what trained models find: type a sentence or drop an image, and see LIFT next to CLIP, with scores.

    Serves one page to browsers on this machine alone, until Ctrl-C.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = ("runs/demo",)
    """Runs or exports, or a folder of them, such as a demo."""
    data: NamedSets = dataclasses.field(default_factory=dict)
    """Sets to search: --data DIR, or names and folders of several: --data openmoji DIR scenes DIR. Default: the
    held-out sets of the demo."""
    port: int = 8017
    """Port on 127.0.0.1; 0: any free one."""
    open: bool = False
    """Open the page in the browser."""
    field: str | None = None
    """Caption to show. Default: the one that the first run was trained on, or txt in a set that does not have it."""
    trust_remote_code: bool = False
    """Run Python code that comes with a text encoder."""
    device: str = "auto"
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __call__(self) -> None:
        from ..eval.sets import field_of, options_of
        from ..gallery import Library, Server
        from ..gallery.find import find_models, find_sets
        from ..inference import load
        from ..inference.features import open_images

        sources = find_models(self.runs)
        folders = self.data or find_sets(self.runs)
        if not folders:
            raise ConfigError(f"no held-out sets lie with {', '.join(self.runs)}; name one: --data DIR")
        with Server(self.port) as server:
            models = {
                name: load(source, device=self.device, trust_remote_code=self.trust_remote_code)
                for name, source in sources.items()
            }
            for model in models.values():
                print_code(model, self.trust_remote_code)
            run = next(iter(models.values())).description
            reading = options_of(run, self.reading)
            sets = {name: open_images(folder, options=reading) for name, folder in folders.items()}
            wanted = run.get("field", "txt")
            fields = {name: self.field or field_of(samples, wanted) for name, samples in sets.items()}
            print_problems([problem for samples in sets.values() for problem in samples.problems])
            library = Library(models, sets, fields)
            for name, causes in library.left_out.items():
                if causes:
                    left_out = f"{counted(causes.total(), 'image')} left out ({listed(causes)})"
                    say(f"{name}: {left_out}")
            what = f"{counted(len(library), 'image')}, {counted(len(models), 'model')}"
            say(f"{what}: {server.url} (Ctrl-C ends it)")
            if self.open:
                webbrowser.open(server.url)
            server.serve(library)
