"""LAION's clip_benchmark scores a model as lift_fast.eval does, through its adapter; and where it differs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import peers
from support.hostile import encoded
from support.small_models import small_model
from support.tiny_models import WORDS, tiny_model

from lift_fast.data.open import open_data
from lift_fast.eval.composition import Rows, composition
from lift_fast.eval.held_out_set import HeldOutSet
from lift_fast.eval.questions import Choice, Classes, Questions
from lift_fast.eval.retrieval import retrieval
from lift_fast.eval.run import evaluate
from lift_fast.inference.clip_benchmark import ForClipBenchmark
from lift_fast.inference.subject import subject_of

KS = (1, 5, 10)

# Scores models with clip_benchmark. argv: pairs of a model and a JSON file that says what to ask.
THEIRS = """
import json, warnings
from pathlib import Path
from clip_benchmark.metrics import image_caption_selection, zeroshot_classification, zeroshot_retrieval
sys.path.append("tests")
import lift_fast
from lift_fast.inference.clip_benchmark import ForClipBenchmark
from support.tiny_models import tiny_model

warnings.simplefilter("ignore")
# Its own makes a number of an array with one element, which NumPy 2.4 refuses.
zeroshot_classification.accuracy = lambda output, target, topk: [
    (output.topk(k)[1] == target[:, None]).any(1).double().mean().item() for k in topk]


def loader(pixels, names, answers, labels=False):
    dataset = torch.utils.data.StackDataset([pixels[name] for name in names], list(answers))
    dataset.classes = classes
    def collate(batch):
        images, some = zip(*batch)
        return torch.stack(images), torch.tensor(some) if labels else list(some)
    return torch.utils.data.DataLoader(dataset, 7, collate_fn=collate)


for source, file in zip(sys.argv[1::2], map(Path, sys.argv[2::2])):
    asked = json.loads(file.read_text())
    classes = asked.get("names", [])
    model = ForClipBenchmark(tiny_model() if source == "tiny" else lift_fast.load(source, device="cpu"))
    pixels = {name: model.transform(file.parent / name) for name in asked["captions"]}
    found = {"retrieval": zeroshot_retrieval.evaluate(
        model, loader(pixels, pixels, asked["captions"].values()), model.tokenizer, "cpu", False, asked["ks"])}
    if classes:
        found["zero_shot"] = zeroshot_classification.evaluate(
            model, loader(pixels, pixels, asked["labels"], True), model.tokenizer, classes, asked["templates"], "cpu",
            False)
    found["composition"] = {
        task: image_caption_selection.evaluate(
            model, loader(pixels, [one[0] for one in some], [one[1:] for one in some]), model.tokenizer, "cpu", False)
        for task, some in asked["choices"].items()}
    print(json.dumps(found))
"""


def close(value):
    return pytest.approx(value, abs=1e-6)


NAMES = ["cat", "old boat", "tree", "red house", "river", "ant", "moon"]
TEMPLATES = ["a photo of a {}.", "{}", "the {} at night"]
WITHOUT_TIES = 47  # images


def without_ties(folder: Path) -> tuple[list[str], Questions]:
    """Writes images of different shapes; their names, and questions with different captions, up to five an image."""
    random = np.random.default_rng(11)
    folder.mkdir()
    files = [f"{i:02d}.png" for i in range(WITHOUT_TIES)]
    for name in files:  # a colour and noise
        size = (int(random.integers(40, 90)), int(random.integers(40, 90)), 3)
        pixels = random.integers(0, 256, 3) * 0.7 + random.integers(0, 80, size)
        (folder / name).write_bytes(encoded(pixels.astype(np.uint8), "PNG"))
    (folder / "t.csv").write_text("file_name,caption\n" + "".join(f"{name},photo {name}\n" for name in files))
    words = ["a", "the", "cat", "dog", "red", "blue", "on", "under", "tree", "old", "two", "runs"]

    def text(number: str) -> str:
        return f"{' '.join(random.choice(words, 4))} {number}"

    captions = {i: [text(f"{i} {k}") for k in range(int(random.integers(1, 6)))] for i in range(WITHOUT_TIES)}
    labels = random.integers(0, len(NAMES) - 1, WITHOUT_TIES).tolist()  # no image is of the last class
    choices = [Choice(("swap", "add")[i % 2], i, (captions[i][0],), text(f"foil {i}")) for i in range(WITHOUT_TIES - 3)]
    return files, Questions(captions, choices, Classes(NAMES, TEMPLATES, dict(enumerate(labels))))


def colours(folder: Path, copies: int) -> dict[str, str]:
    """Images of each of WORDS: file name -> colour."""
    folder.mkdir()
    found = {}
    for i in range(copies):
        for channel, word in enumerate(WORDS):
            pixels = np.full((9, 9, 3), 10 + i, np.uint8)
            pixels[:, :, channel] = 250
            (folder / f"{i}-{word}.png").write_bytes(encoded(pixels, "PNG"))
            found[f"{i}-{word}.png"] = word
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """{"ours": what evaluate returns without ties, "theirs": the same of clip_benchmark, "tied": …, with ties, "files"}

    Skips the test when clip_benchmark is not installed.
    """
    if not (peers.PEERS / "clip_benchmark").is_dir() and importlib.util.find_spec("clip_benchmark") is None:
        pytest.skip(
            f"clip_benchmark is not installed, neither in {peers.PEERS.name}/ of this environment nor in itself"
        )
    root = tmp_path_factory.mktemp("clip_benchmark")
    torch.manual_seed(11)
    model = small_model(root / "run", "clip")
    files, questions = without_ties(root / "without")
    data = open_data(root / "without/t.csv")
    ours = evaluate(subject_of(model), {"set": HeldOutSet(data, questions)}, loader="host")
    by_task: dict[str, list] = {"swap": [], "add": []}
    for one in questions.choices:
        by_task[one.task].append((files[one.sample], *one.captions, one.foil))
    (root / "without/asked.json").write_text(
        json.dumps(
            {
                "ks": KS,
                "captions": dict(zip(files, questions.captions.values(), strict=True)),
                "choices": by_task,
                "names": NAMES,
                "templates": [template.replace("{}", "{c}") for template in TEMPLATES],
                "labels": list(questions.classes.labels.values()),
            }
        )
    )
    coloured = colours(root / "tied", 4)
    choices = [(name, "a red thing", "thing that is red") for name in coloured]
    captions = {name: [word] for name, word in coloured.items()}
    (root / "tied/asked.json").write_text(json.dumps({"ks": (1, 5), "captions": captions, "choices": {"tie": choices}}))
    jobs = (root / "run", root / "without/asked.json", "tiny", root / "tied/asked.json")
    theirs, tied = map(json.loads, peers.run(THEIRS, *jobs, ours=True).splitlines()[-2:])
    return {"ours": ours, "theirs": theirs, "tied": tied, "folder": root / "tied", "colours": coloured}


def test_retrieval(scored):
    ours, theirs = scored["ours"]["retrieval"]["set"], scored["theirs"]["retrieval"]
    assert ours["n"] == WITHOUT_TIES < ours["captions"] and ours["repeats"] == 0
    assert theirs == {
        f"{name}_retrieval_recall@{k}": close(ours[way][f"r{k}"])
        for name, way in (("text", "i2t"), ("image", "t2i"))
        for k in KS
    }
    assert 0 < ours["i2t"]["r5"] < ours["i2t"]["r10"] < 1 and 0 < ours["t2i"]["r1"] < ours["t2i"]["r10"] < 1


def test_zero_shot(scored):
    ours, theirs = scored["ours"]["zero_shot"]["set"], scored["theirs"]["zero_shot"]
    assert theirs == {
        "acc1": close(ours["top1"]),
        "acc5": close(ours["top5"]),
        "mean_per_class_recall": close(ours["mean_per_class"]),
    }
    assert 0 < ours["top1"] < ours["top5"] < 1 and ours["mean_per_class"] != close(ours["top1"])


def test_composition(scored):
    ours, theirs = scored["ours"]["composition"]["set"], scored["theirs"]["composition"]
    assert ours["counts"] == {"swap": 22, "add": 22} and sum(ours["ties"].values()) == 0
    for task in ("swap", "add"):
        assert theirs[task] == {"image_acc": 1, "text_acc": close(ours[task]), "acc": close(ours[task])}
        assert 0 < ours[task] < 1


def test_where_the_two_differ_by_definition(scored):
    """A model that knows each colour, and nothing else: captions repeat, and texts without a colour tie."""
    files, theirs = scored["colours"], scored["tied"]
    model = tiny_model()
    image = model.encode_image([scored["folder"] / name for name in files])
    distinct = list(dict.fromkeys(files.values()))
    text_of = [distinct.index(word) for word in files.values()]
    ours = retrieval(image, model.encode_text(distinct), list(range(len(files))), text_of)
    # Equal captions: all of them are right here, an image's own alone there.
    assert ours["i2t"]["r1"] == ours["t2i"]["r1"] == 1 and ours["repeats"] == 9
    assert theirs["retrieval"]["text_retrieval_recall@1"] == close(1 / 4)
    assert theirs["retrieval"]["image_retrieval_recall@1"] == close(1 / 4)
    # Ties: against the model here, for the text that stands first there.
    both = model.encode_text(["a red thing", "thing that is red"])
    tied = composition(image, both, [Rows("tie", i, (0,), 1) for i in range(len(files))])
    assert tied["tie"] == 0 and tied["ties"] == {"tie": len(files)}
    assert theirs["composition"]["tie"]["text_acc"] == 1


def test_the_adapter():
    model = ForClipBenchmark(tiny_model())
    numbers = model.tokenizer(["red", "a blue one", "red"])
    assert numbers.dtype == torch.int64 and numbers.tolist() == [[0], [1], [0]]
    assert model.tokenizer("a blue one").tolist() == [[1]] and model.tokenizer([]).shape == (0, 1)
    assert model.tokenizer(["green", "red"]).tolist() == [[2], [0]]
    expected = model.model.encode_text(["green", "red", "a blue one"])
    assert torch.equal(model.encode_text(torch.tensor([[2], [0], [1]])), expected)
    with pytest.raises(IndexError):
        model.encode_text(torch.tensor([[3]]))
    pixels = torch.stack([model.transform(np.full((9, 12, 3), 7 * i, np.uint8)) for i in range(5)])
    assert torch.equal(model.encode_image(pixels), model.model.encode_image(pixels))
    assert model.encode_image(pixels[:0]).shape == (0, 7)
