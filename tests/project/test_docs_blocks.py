"""Every code block of README.md, CONTRIBUTING.md and docs/ runs as pasted, alone.

Each block is a test, README.md:42. It runs in an empty folder but for what it needs: the files of `places`, by the
names that the docs use throughout (shards/train, runs/demo, cat.jpg), without those that the block makes (its --out).
A comment before a block, `<!-- needs: NAME, NAME -->`, names values that the reader's own program has; VALUES has them.

- python: in a namespace of its own.
- bash, or no language: in bash, where every command must succeed. console: the same with prompts; what is shown below a
  command is what it prints, but for numbers.

Anything else fails. `lift-fast` runs with the real parser and the arguments as pasted. What is too
heavy for a test, or of no use in one, is done differently:

| what | what happens instead | why |
|-|-|-|
| training | the ViT is SMALL; at most MOST_IMAGES in a run | the README's run takes a GPU hours |
| `--threads` of training | this machine's cores | twelve threads on two cores take ten times as long |
| the gallery | on any free port, until its client has read it | it serves until Ctrl-C |
| progress | not printed | a page shows the end of a command |
| text encoders of the hub | the built-in MiniLM | tests use no network |
| `torchrun`, `srun` | their program runs once, as one rank | tests/train and tests/cli start ranks |
| `scontrol` | prints a host | there is no SLURM |
| `deepspeed`, of LLaVA | its options are compared with LLaVA's | LLaVA is not installed, and takes GPUs a day |
| `pip install` | its extras are compared with pyproject.toml | tests/project/test_build.py builds the package |
| `make` | `make -n`: the target exists | the tests are one of the targets |
| Ctrl-C | SIGINT to this process in the step that the page shows | nobody presses it |
| open_clip | an empty module | its import needs torchvision; test_recipes.py compares with its losses |
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from io import BytesIO, StringIO
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock
from urllib.request import ProxyHandler, build_opener

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from support import complete  # noqa: F401
from support.shell_blocks import Answer, Program, run
from support.tiny_benchmarks import write_docs_sets
from support.tiny_sets import png
from transformers import CLIPConfig, CLIPModel

from lift_fast import progress
from lift_fast.cli.main import STOPPED, main
from lift_fast.data.shards import ShardWriter
from lift_fast.gallery import Library, Server
from lift_fast.nn import PRESETS, Lift, VitConfig, weights
from lift_fast.train.setup import Training

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The blocks of a page and language that another test runs, each alone.
ELSEWHERE = {
    ("docs/data.md", "console"): "tests/cli/test_data_cli.py, which also compares what they print",
    ("docs/export.md", "python"): "tests/export/test_export_docs.py: with the export above it, and that project's code",
    ("docs/vit.md", "python"): "tests/project/test_vit_docs.py, which also compares their values",
}

SMALL = VitConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2)
MOST_IMAGES = 1024
VALUES: dict[str, Callable[[], Any]] = {
    "image_features": lambda: torch.nn.functional.normalize(torch.randn(9, 8), dim=-1),
    "text_features": lambda: torch.nn.functional.normalize(torch.randn(9, 8), dim=-1),
    "logit_scale": lambda: torch.tensor(2.7),
}


# ---- what there is


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence (from 1), its language, its text, and the needs before it."""

    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a page. "indented" and "open" are the languages of indented code, and of a fence without end."""
    found = []
    lines = text.splitlines()
    before = ""  # the last line that is not empty
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if fence := re.match(r"( *)(`{3,}|~{3,}) *([^`]*)$", line):
            indent, marks, language = fence.groups()
            end = next((n for n in range(number, len(lines)) if lines[n].strip() == marks), None)
            if end is None:
                end, language = len(lines), "open"
            inside = [row.removeprefix(indent) + "\n" for row in lines[number:end]]
            needs = re.match(r" *<!-- needs: (.*) -->$", before)
            names = tuple(needs[1].split(", ")) if needs else ()
            found.append(Block(page, number, language.strip(), "".join(inside), names))
            number = end + 1
        elif line.startswith(("    ", "\t")) and not lines[number - 2].strip() and not re.match(r" |[-*\d]", before):
            found.append(Block(page, number, "indented", line))
        before = line if line.strip() else before
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), page.relative_to(ROOT).as_posix())]


# ---- what they need


def lift_fast(words: list[str]) -> Answer:
    """`lift-fast WORDS` in this process."""
    said, status = StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Answer(said.getvalue(), status)


class ReadOnce(Server):
    """Takes any free port, and serves until its client has read what the gallery has."""

    def __init__(self, port: int):
        super().__init__()

    def serve(self, library: Library) -> None:
        def read() -> None:
            try:
                with build_opener(ProxyHandler({})).open(f"{self.url}api/gallery") as answer:
                    contents.update(json.load(answer))
            finally:
                self.shutdown()

        contents: dict = {}
        client = threading.Thread(target=read)
        client.start()
        super().serve(library)
        client.join()
        assert contents["models"]


@contextmanager
def light() -> Iterator[None]:
    """Makes the commands light: the ViT of all presets is SMALL, runs are short, and no hub is asked."""
    from lift_fast.text import repository
    from lift_fast.text.spec import EncoderSpec
    from lift_fast.train import loop

    built_in, train, configure = repository.locate(EncoderSpec())[0], loop.train, progress.configure

    def shortened(config, **options):
        steps = min(config.steps, max(1, MOST_IMAGES // config.batch_size))
        return train(replace(config, steps=steps, threads=None), **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in PRESETS:
            patch.setitem(PRESETS, name, replace(PRESETS["tiny"], vit=SMALL))
        patch.setattr(loop, "train", shortened)
        patch.setattr("huggingface_hub.snapshot_download", lambda name, **options: built_in)
        patch.setattr("lift_fast.gallery.Server", ReadOnce)
        patch.setattr(progress, "configure", lambda quiet, every: configure(quiet=True))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A folder with the files that the docs name."""
    folder = tmp_path_factory.mktemp("places")
    rng = random.Random(5)
    for name, count in {"train": 1040, "more": 20, "heldout": 20}.items():
        with ShardWriter(folder / "shards" / name, 400) as writer:
            for i in range(count):
                writer.write(f"{name}-{i}", png(rng, (16, 16)), f"{name} {i % 20}", {"long": f"a longer {name} {i}"})
    write_docs_sets(folder)
    for name in ("cat", "dog"):
        Image.open(BytesIO(png(rng, (90, 70)))).save(folder / f"{name}.jpg")
    (folder / "embeddings/train-00000-of-00001").mkdir(parents=True)
    table = pa.table({"key": ["a.jpg", "b.jpg"], "embedding": torch.randn(2, 32).tolist()})
    parquet.write_table(table, folder / "embeddings/train-00000-of-00001/0.parquet")
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision)).save_pretrained(folder / "clip-vit-base-patch32")
    lift = Lift(replace(PRESETS["tiny"], vit=replace(SMALL, width=64, heads=1)), 384)
    state = weights.save(lift.visual, "lift", head=lift.head, logit_scale=lift.logit_scale)
    torch.save({"state_dict": state}, folder / "lift.pt")
    with light(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in MADE.splitlines():
            done = lift_fast(line.split())
            assert not done.status, done.said
        for run_json in Path("runs").rglob("run.json"):  # so that the preset's own sizes do not matter
            run_json.write_text(json.dumps(json.loads(run_json.read_text()) | {"vit": asdict(SMALL)}))
        for model in ("lift", "clip"):
            shutil.copytree(f"runs/demo/{model}", f"runs/{model}", copy_function=os.link)
            for kept in ("step-00001000", "best"):
                shutil.copytree(f"runs/demo/{model}", f"runs/{model}/weights/{kept}", copy_function=os.link)
    return folder


# How the files of `places` are made from shards/.
MADE = """\
data scenes --out made --train 80 --heldout 20 --px 32
data scenes --out runs/demo/data/scenes --train 40 --heldout 12 --px 32
embed --data shards/train --out cache/train
embed --data runs/demo/data/scenes/train --out runs/demo/cache/scenes
train --model lift --data runs/demo/data/scenes/train --cache runs/demo/cache/scenes --out runs/demo/lift --steps 2 \
--batch-size 8
train --model clip --data runs/demo/data/scenes/train --out runs/demo/clip --steps 2 --batch-size 8
eval --run runs/demo/lift --data scenes runs/demo/data/scenes/heldout --json runs/demo/lift/eval.json
eval --run runs/demo/clip --data scenes runs/demo/data/scenes/heldout --json runs/demo/clip/eval.json
""".replace("\\\n", "")


@pytest.fixture
def place(places, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of `places`, which is the working directory. Files are links: what replaces one leaves the other."""
    folder = tmp_path / "work"
    shutil.copytree(places, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


# ---- programs of shell blocks


def torchrun(words: list[str]) -> Answer:
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words)
    assert arguments.no_python, "torchrun would start lift-fast with Python"
    return Answer(instead=[arguments.training_script, *arguments.training_script_args])


def srun(words: list[str]) -> Answer:
    assert words[0] == "--cpus-per-task" and words[1].isdigit()
    task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    return Answer(instead=words[2:], env=task)


def scontrol(words: list[str]) -> Answer:
    assert words[:2] == ["show", "hostnames"] or words[0] == "requeue"
    return Answer("localhost\n")


def pip(words: list[str]) -> Answer:
    """`pip install` of lift-fast: the extras are those of pyproject.toml."""
    assert words[0] == "install" and len(words) > 1
    extras = set(metadata.metadata("lift-fast").get_all("Provides-Extra"))
    for word in words[1:]:
        named = re.fullmatch(r"(\.|lift-fast)(?:\[(.+)\])?", word)
        assert named, f"pip install {word}"
        assert extras.issuperset((named[2] or "").split(",")) or not named[2], f"no such extra: {word}"
    return Answer()


def make(words: list[str]) -> Answer:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    return Answer(done.stderr, done.returncode)


# Options of llava/train/train.py (haotian-liu/LLaVA), and those of transformers' TrainingArguments, at the version that
# LLaVA pins, that its scripts use.
LLAVA = {
    "model_name_or_path", "version", "freeze_backbone", "tune_mm_mlp_adapter", "vision_tower", "mm_vision_select_layer",
    "pretrain_mm_mlp_adapter", "mm_projector_type", "mm_use_im_start_end", "mm_use_im_patch_token",
    "mm_vision_select_feature", "data_path", "lazy_preprocess", "is_multimodal", "image_folder", "image_aspect_ratio",
    "cache_dir", "optim", "remove_unused_columns", "freeze_mm_mlp_adapter", "model_max_length", "bits", "lora_enable",
    "mm_projector_lr", "group_by_modality_length", "deepspeed", "output_dir", "bf16", "tf32", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_ratio",
    "lr_scheduler_type", "gradient_checkpointing", "dataloader_num_workers", "evaluation_strategy", "save_strategy",
    "save_steps", "save_total_limit", "logging_steps",
}  # fmt: skip


def deepspeed(words: list[str]) -> Answer:
    script, *options = words
    assert script == "llava/train/train_mem.py" and len(options) % 2 == 0
    for name, value in zip(options[::2], options[1::2], strict=True):
        assert name.removeprefix("--") in LLAVA and not value.startswith("--"), f"{name} {value}"
    return Answer()


PROGRAMS: dict[str, Program] = {
    "lift-fast": lift_fast,
    "torchrun": torchrun,
    "srun": srun,
    "scontrol": scontrol,
    "deepspeed": deepspeed,
    "pip": pip,
    "make": make,
}


# ---- languages


def python(block: Block, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"} | {name: VALUES[name]() for name in block.needs}
    # With the lines of the page, for the traceback.
    exec(compile("\n" * block.line + block.text, block.page, "exec"), names)


def bash(block: Block, folder: Path) -> None:
    with light():
        status, said = run("set -e\n" + block.text, folder, PROGRAMS)
    assert status == 0, said


def session(text: str) -> list[tuple[str, str]]:
    """The commands after the prompts of a console block, and what is shown below each."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            assert found, "a console block begins with a prompt, $"
            command, shown = found[-1]
            found[-1] = (command, shown + line) if shown or not command.endswith("\\\n") else (command + line, "")
    return found


def console(block: Block, folder: Path) -> None:
    commands = session(block.text)
    mark = "end of command"
    # NUMBER is that of the command that runs.
    script = "".join(
        f"export NUMBER={number}\n{command}echo {mark} $?\n" for number, (command, _) in enumerate(commands)
    )
    kept = Training.kept

    def interrupted(self, now):
        if stop := re.search(r"\^C\n.*after step (\d+)", commands[int(os.environ["NUMBER"])][1]):
            if now + 1 == int(stop[1]):
                signal.raise_signal(signal.SIGINT)
        return kept(self, now)

    with light(), mock.patch.object(Training, "kept", interrupted):
        _, said = run(script, folder, PROGRAMS)
    parts = re.findall(rf"(.*?){mark} (\d+)\n", said, re.S)
    assert len(parts) == len(commands), said
    for (printed, status), (command, shown) in zip(parts, commands, strict=True):
        failed = 2 if "lift-fast: error:" in shown else STOPPED if "^C" in shown else 0
        assert int(status) == failed, f"{command}{printed}"
        shown = shown.removeprefix("^C\n")
        assert not shown or without_numbers(printed) == without_numbers(shown), command


def without_numbers(text: str) -> str:
    return re.sub(r"\d[\d.,]*", "N", text)


LANGUAGES = {"python": python, "": bash, "bash": bash, "console": console}


def check(block: Block, folder: Path) -> None:
    assert block.language in LANGUAGES, f"{block}: no rule for the language {block.language!r}"
    for made in re.findall(r"--out[ =](\S+)", block.text):
        assert not Path(made).is_absolute()
        shutil.rmtree(folder / made, ignore_errors=True)
        (folder / made).unlink(missing_ok=True)
    LANGUAGES[block.language](block, folder)


@pytest.mark.parametrize("block", [block for block in BLOCKS if (block.page, block.language) not in ELSEWHERE], ids=str)
def test_the_block_runs(block, place, monkeypatch):
    factory = ModuleType("open_clip.factory")
    package = ModuleType("open_clip")
    package.factory = factory
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.setitem(sys.modules, "open_clip.factory", factory)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check(block, place)


def test_blocks_that_other_tests_run():
    for (page, language), where in ELSEWHERE.items():
        assert any((block.page, block.language) == (page, language) for block in BLOCKS)
        test = (ROOT / re.split(r"[,:]", where)[0]).read_text()
        assert f"```{language}" in test and Path(page).name in test


# ---- that bad blocks fail


def of(language: str, *lines: str) -> Block:
    (block,) = blocks_of("\n".join([f"```{language}", *lines, "```"]), "page.md")
    return block


@pytest.mark.parametrize(
    ("reason", "block"),
    [
        ("language 'open'", blocks_of("```bash\n", "page.md")[0]),
        ("language 'indented'", blocks_of("\n    make all\n", "page.md")[0]),
        (r"language 'c\+\+'", of("c++", "int x;")),
        ("'x' is not defined", of("python", "print(x)")),
        ("no-such-program: command not found", of("", "no-such-program")),
        ("curl: command not found", of("", "curl https://example.com")),
        ("unexpected EOF", of("", "unfinished '")),
        ("No rule to make target", of("", "make no-such-target")),
        ("no such extra", of("", "pip install '.[dali,no-such-extra]'")),
        ("pip install no-such-package", of("", "pip install no-such-package")),
        ("--no-such-option", of("", "lift-fast data stats made/train --no-such-option")),
        ("Unrecognized options: …", of("", "lift-fast data stats made/train …")),
        ("no-such-folder", of("", "lift-fast data stats no-such-folder")),
        ("no-such-folder", of("", "lift-fast data stats no-such-folder", "echo")),
        ("no-such-folder", of("", "for x in 1; do lift-fast data stats no-such-folder; done", "echo")),
        ("with Python", of("", "torchrun --nproc-per-node 2 lift-fast data stats made/train")),
        ("no-such-folder", of("", "torchrun --no-python lift-fast data stats no-such-folder")),
        ("no-such-folder", of("", "srun --cpus-per-task 2 bash -c 'lift-fast data stats no-such-folder'")),
        ("--no_such", of("", "deepspeed llava/train/train_mem.py --deepspeed zero2.json --no_such 3")),
        ("begins with a prompt", of("console", "lift-fast data stats made/train")),
        ("no-such-folder", of("console", "$ lift-fast data stats no-such-folder", "$ echo")),
        ("(?s)lift-fast --version.*another", of("console", "$ lift-fast --version", "another")),
        ("lift-fast --version", of("console", "$ lift-fast --version", "lift-fast: error: 1")),
        ("false", of("console", "$ false", "$ true")),
    ],
    ids=str,
)
def test_a_bad_block_fails(reason, block, place):
    with pytest.raises((AssertionError, NameError, ValueError), match=reason):
        check(block, place)


def test_an_option_that_torchrun_does_not_have(place):
    with pytest.raises(SystemExit):
        check(of("", "torchrun --no-python --no-such-option lift-fast data stats made/train"), place)


def test_blocks_are_found():
    page = "# a\n\n```python\nx\n```\n\n- b\n\n  <!-- needs: y, z -->\n\n  ~~~\n  make\n    all\n  ~~~\n\n```\n```\n"
    assert blocks_of(page, "p") == [
        Block("p", 3, "python", "x\n"),
        Block("p", 11, "", "make\n  all\n", ("y", "z")),
        Block("p", 16, "", ""),
    ]
    assert blocks_of("```python\nx\n", "p") == [Block("p", 1, "open", "x\n")]
    assert blocks_of("a\n\n    make all\n", "p") == [Block("p", 3, "indented", "    make all")]
    assert blocks_of("a\n\n\tmake all\n", "p") == [Block("p", 3, "indented", "\tmake all")]


def test_every_fence_is_in_a_block():
    """Counted in another way than blocks_of does."""
    fences = sum(len(re.findall(r"^\s*```", page.read_text(), re.M)) for page in PAGES)
    assert fences == 2 * len(BLOCKS) > 60
