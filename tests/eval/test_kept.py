"""eval/kept.py: features that are kept, used again while nothing that makes them has changed, and never trusted."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.counted import DIM, Counted, asking_set, figures
from support.hostile import encoded
from support.small_models import small_model
from support.tiny_models import tiny_model
from support.tiny_sets import png

import lift_fast
from lift_fast import files, progress
from lift_fast.cli.main import main
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.errors import DataError, EncoderError, TrainingError
from lift_fast.eval import images as images_module
from lift_fast.eval import kept as kept_module
from lift_fast.eval import texts as texts_module
from lift_fast.eval.images import Images, Pixels, image_features
from lift_fast.eval.kept import Kept
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set
from lift_fast.eval.texts import encode_texts
from lift_fast.inference.subject import features_folder, subject_of
from lift_fast.ranks import Rank
from lift_fast.text import identity as identity_module
from lift_fast.text.spec import EncoderSpec

CPU = torch.device("cpu")
SIZE = Pixels.of_size(16)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Files of 64 images and of 256 texts."""
    monkeypatch.setattr(images_module, "_PIECE", 64)
    monkeypatch.setattr(texts_module, "_PIECE", 256)


@pytest.fixture
def model():
    return Counted()


def scores(model, sets, features, **options):
    """What evaluate returns, as text, and how many images and texts it encoded."""
    opened = {name: open_set(path) if isinstance(path, Path) else path for name, path in sets.items()}
    result = evaluate(model.subject, opened, features=features, **options)
    return figures(result), model.again()


def test_the_second_time_nothing_is_encoded(tmp_path, model):
    sets = {"set": asking_set(tmp_path / "set", 150, broken={3, *range(64, 128)})}
    want, (images, texts) = scores(model, sets, None)
    assert images == 150 - 65 + 1 and texts > 1000  # a black image for the chunk of which none decodes
    assert scores(model, sets, tmp_path / "f") == (want, (images, texts))
    assert len(list((tmp_path / "f/images").rglob("*.safetensors"))) == 3 == -(-150 // 64)
    assert len(list((tmp_path / "f/texts").rglob("*.safetensors"))) == -(-texts // 256)
    assert not list((tmp_path / "f").rglob("*.part"))
    assert scores(Counted(seed=1), sets, tmp_path / "f") == (want, (0, 0))  # of one identity: nothing is encoded


def test_a_set_under_two_names_is_encoded_once(tmp_path, model):
    path = asking_set(tmp_path / "set", 70)
    _, (images, texts) = scores(model, {"one": path, "two": path}, tmp_path / "f")
    assert images == 70
    assert scores(model, {"three": path}, tmp_path / "f")[1] == (0, 0)
    shutil.copytree(path, tmp_path / "copy")  # times of files are copied too
    assert scores(model, {"copy": tmp_path / "copy"}, tmp_path / "f")[1] == (0, 0)


def test_what_is_computed_before_a_set_that_fails_stays(tmp_path, model):
    sets = {str(i): asking_set(tmp_path / f"{i}", 20, seed=i, broken=range(20) if i == 1 else ()) for i in range(3)}
    with pytest.raises(DataError, match=r"no image decodes \(20 not a picture\)"):
        scores(model, sets, tmp_path / "f")
    model.again()
    asking_set(tmp_path / "1" / "new", 20, seed=1)
    os.replace(next((tmp_path / "1/new").glob("*.tar")), next((tmp_path / "1").glob("*.tar")))
    want = scores(model, sets, None)[0]
    found, (images, _) = scores(model, sets, tmp_path / "f")
    assert found == want and images == 40


class Slow(Counted):
    """Sleeps after the tower has been called `calls` times."""

    calls = 5

    def encode_image(self, pixels):
        if len(self.seen) == self.calls:
            time.sleep(600)
        return super().encode_image(pixels)


class SlowTexts(Counted):
    def encode_text(self, texts):
        if len(self.asked) >= 600:
            time.sleep(600)
        return super().encode_text(texts)


def evaluate_slowly(kind, path, features):
    images_module._PIECE, texts_module._PIECE = 64, 256
    scores(kind(), {"set": path}, features, batch_size=16)


@pytest.mark.parametrize("kind", [Slow, SlowTexts])
def test_an_evaluation_that_was_killed_goes_on(tmp_path, model, kind):
    """Slow has made one piece of 64 images, four batches, and begun the second; SlowTexts two of 256 texts."""
    path = asking_set(tmp_path / "set", 150)
    want, (_, texts) = scores(model, {"set": path}, None, batch_size=16)
    process = multiprocessing.get_context("forkserver").Process(
        target=evaluate_slowly, args=(kind, path, tmp_path / "f")
    )
    process.start()
    pattern, count = ("images/*/*.safetensors", 1) if kind is Slow else ("texts/*/*.safetensors", 2)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "f").glob(pattern))) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)  # on with the next piece
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list((tmp_path / "f").glob(pattern))) == count
    whole = next((tmp_path / "f").glob(pattern))
    left = whole.with_name(files._tagged(whole.name))
    found = scores(model, {"set": path}, tmp_path / "f", batch_size=16)
    assert found == (want, (150 - 64, 0) if kind is Slow else (150, texts - 512))
    left.write_bytes(b"of a kill")  # it is removed when a file of its folder is made
    whole.unlink()
    assert scores(model, {"set": path}, tmp_path / "f", batch_size=16)[0] == want and not left.exists()


def written_again(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def test_a_changed_image_caption_and_member_are_noticed(tmp_path, model):
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(130):
        (folder / f"{i:03d}.png").write_bytes(png(random.Random(i)))
        (folder / f"{i:03d}.txt").write_text(f"caption {i}")
    options = DataOptions(shard_rows=50)

    def found():
        result, counts = scores(model, {"set": open_set(folder, options=options)}, tmp_path / "f")
        assert result == scores(model, {"set": open_set(folder, options=options)}, None)[0]
        model.again()
        return counts

    assert found() == (130, 130) and found() == (0, 0)
    written_again(folder / "120.png", png(random.Random(999)))  # in the second piece, and the third shard: 100 to 129
    assert found() == (66, 0) and found() == (0, 0)  # its piece, and the last one, of the same shard
    written_again(folder / "007.txt", b"another caption")
    assert found() == (0, 1)
    (folder / "129.png").unlink()
    (folder / "129.txt").unlink()
    assert found() == (65, 0)
    (folder / "000.png").write_bytes(b"no picture")
    assert found() == (63, 0)


def test_another_column_of_a_table_has_other_features(tmp_path, model):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(random.Random(i)))
    rows = "".join(f"{i}.png,{5 - i}.png,caption {i},k{i}\n" for i in range(6))
    (tmp_path / "t.csv").write_text("file_name,other,text,key\n" + rows)
    for column in ("file_name", "other"):
        for images in (6, 0):
            opened = open_set(tmp_path / "t.csv", options=DataOptions(image_column=column))
            want = scores(model, {"set": opened}, None)[0]
            model.again()
            assert scores(model, {"set": opened}, tmp_path / "f") == (
                want,
                (images, 6 if images and column != "other" else 0),
            )


def test_another_column_of_images_in_parquet_has_other_features(tmp_path, model):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {
        name: [{"bytes": png(random.Random(i + k)), "path": "x"} for i in range(6)] for k, name in ((0, "a"), (9, "b"))
    }
    pq.write_table(pa.table(columns | {"text": [f"caption {i}" for i in range(6)]}), tmp_path / "t.parquet")
    for column in ("a", "b"):
        for images in (6, 0):
            opened = open_set(tmp_path / "t.parquet", options=DataOptions(image_column=column))
            assert scores(model, {"set": opened}, tmp_path / "f")[1][0] == images


def test_another_model_loader_batch_size_or_preprocessing_has_other_features(tmp_path, model):
    path = asking_set(tmp_path / "set", 20)
    want = scores(model, {"set": path}, tmp_path / "f")[0]
    other = Counted(seed=1, image="other")
    assert scores(other, {"set": path}, tmp_path / "f")[1] == (20, 0)  # they share the texts
    assert scores(Counted(text="other"), {"set": path}, tmp_path / "f")[1][0] == 0
    assert scores(model, {"set": path}, tmp_path / "f", batch_size=8) == (want, (20, 0))
    data = open_data(path)
    ways = [
        Images(data, SIZE, CPU),
        Images(data, SIZE, CPU, batch_size=63),
        Images(data, SIZE, CPU, "dali"),
        Images(data, Pixels(16, 17), CPU),
        Images(data, Pixels(16, 16, (0.5, 0.4, 0.3)), CPU),
        Images(data, Pixels(16, 16, std=(0.5, 0.4, 0.3)), CPU),
        Images(data, SIZE, torch.device("cuda"), "host"),
    ]
    assert len({json.dumps(images.made_by) for images in ways}) == len(ways)
    assert scores(model, {"set": path}, tmp_path / "f")[1] == (0, 0)


def test_without_an_identity_nothing_is_kept(tmp_path):
    path = asking_set(tmp_path / "set", 5)
    for image, text in ((None, "text"), ("image", None)):
        model = Counted(image=image, text=text)
        first, again = (scores(model, {"set": path}, tmp_path / f"{image}")[1] for _ in range(2))
        assert again == (first[0] if image is None else 0, first[1] if text is None else 0)


class Nothing:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def changed(path: Path, how: str, marker: Path) -> None:
    """Damages or replaces a file of features."""
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    wide = "features" if "features" in tensors else "vectors"
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":  # in the tensors: the header is checked by safetensors
        at = random.randrange(8 + int.from_bytes(content[:8], "little"), len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :])
    elif how == "a pickle":
        path.write_bytes(pickle.dumps(Nothing(marker)))
    elif how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a link to nothing":
        path.symlink_to("nowhere")
    elif how == "a huge header":
        path.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    else:
        value = {
            "NaN": lambda t: t.index_fill(0, torch.tensor([1]), torch.nan),
            "float64": lambda t: t.double(),
            "one more": lambda t: torch.cat([t, t[:1]]),
            "flat": lambda t: t.reshape(-1),
            "of no width": lambda t: t[:, :0],
            "another width": lambda t: t[:, :-1].contiguous(),
            "another format": lambda t: t,
            "another identity": lambda t: t,
        }[how](tensors[wide])
        about = about | {"sha256": kept_module._sha256({**tensors, wide: value})}  # as one who forges it would
        about |= {"format": "x"} if how == "another format" else {"identity": "x"} if how == "another identity" else {}
        save_file({**tensors, wide: value}, path, about)


HOW = [
    "cut",
    "empty",
    "a bit",
    "a pickle",
    "a folder",
    "a pipe",
    "a link to nothing",
    "a huge header",
    "NaN",
    "float64",
]
HOW += ["one more", "flat", "of no width", "another width", "another format", "another identity"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.filterwarnings("ignore:features are not kept")  # where a folder is
def test_a_file_that_is_damaged_or_forged_is_made_again(tmp_path, model, how, kind):
    path = asking_set(tmp_path / "set", 70)
    want, (images, texts) = scores(model, {"set": path}, tmp_path / "f")
    files = sorted((tmp_path / "f" / kind).rglob("*.safetensors"))
    changed(random.choice(files), how, tmp_path / "marker")
    found, (images_again, texts_again) = scores(model, {"set": path}, tmp_path / "f")
    assert found == want and not (tmp_path / "marker").exists()
    if how == "another width":  # nothing tells which of them is right: all are made again
        assert (images_again or texts_again) and images_again in (0, images)
    elif kind == "images":
        assert images_again in (6, 64) and texts_again == 0
    elif how == "one more":  # a row that no text asks for
        assert (images_again, texts_again) == (0, 0)
    else:
        assert images_again == 0 and texts_again in (256, texts % 256)
    if how not in ("a folder", "another width"):
        assert scores(model, {"set": path}, tmp_path / "f") == (want, (0, 0))


def test_samples_and_causes_that_do_not_fit_are_not_trusted(tmp_path, model):
    data = open_data(asking_set(tmp_path / "set", 10, broken={4, 7}))
    kept = Kept(tmp_path / "f", "image", None)
    want = image_features(model.encode_image, Images(data, SIZE, CPU), kept)
    [file] = (tmp_path / "f").rglob("*.safetensors")
    with safe_open(file, "pt") as opened:
        tensors, about = {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    samples = tensors["samples"]
    assert samples.tolist() == [0, 1, 2, 3, 5, 6, 8, 9] and json.loads(tensors["causes"].numpy().tobytes())
    for name, value in (
        ("samples", samples.flip(0)),
        ("samples", samples + 1),
        ("samples", samples - 1),
        ("samples", samples.clamp(max=8)),
        ("samples", samples.view(1, -1)),
        *(
            ("causes", text)
            for text in ("", "[]", "2", '{"x": 1}', '{"x": 3, "y": -1}', '{"x": 2.0}', '{"x": "2"}', "[" * 9999)
        ),
    ):
        if name == "causes":
            value = torch.tensor(list(value.encode()), dtype=torch.uint8)
        forged = tensors | {name: value.contiguous()}
        save_file(forged, file, about | {"sha256": kept_module._sha256(forged)})
        model.again()
        found = image_features(model.encode_image, Images(data, SIZE, CPU), kept)
        assert model.again()[0] == 8 and torch.equal(found.features, want.features) and found[1:] == want[1:]


def test_features_of_another_width_than_the_models_are_made_again(tmp_path, model):
    data = open_data(asking_set(tmp_path / "set", 70))
    kept = Kept(tmp_path / "f", "image", "text")
    image_features(lambda pixels: torch.ones(len(pixels), 3), Images(data, SIZE, CPU), kept)
    encode_texts([f"{i}" for i in range(300)], lambda texts: torch.ones(len(texts), 3), Rank(), False, kept.texts())
    next((tmp_path / "f/images").rglob("*.safetensors")).unlink()
    next((tmp_path / "f/texts").rglob("*.safetensors")).unlink()
    found = image_features(model.encode_image, Images(data, SIZE, CPU), kept)
    assert torch.equal(found.features, image_features(model.encode_image, Images(data, SIZE, CPU)).features)
    texts = encode_texts([f"{i}" for i in range(300)], model.encode_text, Rank(), False, kept.texts())
    assert torch.equal(texts.vectors, model.encode_text([f"{i}" for i in range(300)]))


def test_texts_are_looked_up_by_text(tmp_path, model):
    kept = Kept(tmp_path, None, "text")
    first = ["über", "a\nb", "日本", "", " ", "a", "aa"]
    for texts, asked in ((first, first), (first[::-1], []), (["b", "a", "c"], ["b", "c"]), (["c", "日本"], [])):
        found = encode_texts(texts, model.encode_text, Rank(), False, kept.texts())
        assert torch.equal(found.vectors, Counted().encode_text(texts)) and model.asked == asked
        model.again()
    encode_texts(["c", "d"], model.encode_text, Rank(), False, Kept(tmp_path, None, "other").texts())
    assert model.asked == ["c", "d"]


def test_texts_without_tokens(tmp_path, model):
    """With skip_bad they are kept as such; without, the encoder says so each time."""
    kept = Kept(tmp_path, None, "text")
    texts = ["a", "..", "b", "."]
    for asked in (2, 0):
        found = encode_texts(texts, model.encode_text, Rank(), True, kept.texts())
        assert found.empty == {"..", "."} and len(model.asked) == asked
        model.again()
    with pytest.raises(EncoderError, match=r"no tokens in '\.\.'"):
        encode_texts(texts, model.encode_text, Rank(), False, kept.texts())
    chunk = [f"{i}" for i in range(128)] + ["..."]  # alone in its chunk
    found = encode_texts(chunk, model.encode_text, Rank(), True, kept.texts())
    assert found.empty == {"..."} and found.vectors.shape == (129, DIM)
    assert encode_texts([], model.encode_text, Rank(), True, kept.texts()).vectors.shape[0] == 0


def test_features_that_are_not_finite_are_not_kept(tmp_path, model):
    path = asking_set(tmp_path / "set", 5)
    encode_image = model.encode_image
    model.encode_image = lambda pixels: encode_image(pixels) * torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        scores(model, {"set": path}, tmp_path / "f")
    assert not list((tmp_path / "f/images").rglob("*.safetensors"))
    model.encode_image = encode_image
    model.again()
    assert scores(model, {"set": path}, tmp_path / "f")[1] == (5, 0)


def test_a_folder_that_cannot_be_written_is_said_once_and_harms_nothing(tmp_path, model):
    path = asking_set(tmp_path / "set", 70)
    (tmp_path / "file").write_text("")
    want = scores(model, {"set": path}, None)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert scores(model, {"set": path}, tmp_path / "file" / "f")[0] == want
    [warning] = [str(one.message) for one in said if "kept" in str(one.message)]
    assert warning == f"features are not kept: {tmp_path / 'file' / 'f'} cannot be written (Not a directory)"


def test_a_read_only_folder_is_read(tmp_path, model, monkeypatch):
    path = asking_set(tmp_path / "set", 70)
    want, _ = scores(model, {"set": path}, tmp_path / "f")
    monkeypatch.setattr(kept_module, "write_whole", unwritable)
    assert scores(model, {"set": path}, tmp_path / "f") == (want, (0, 0))
    changed(sorted((tmp_path / "f/images").rglob("*.safetensors"))[0], "cut", tmp_path)
    with pytest.warns(UserWarning, match=r"features are not kept: .*/f cannot be written \(Read-only file system\)"):
        assert scores(model, {"set": path}, tmp_path / "f")[1][0] in (6, 64)


def unwritable(files):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_both_of_two_processes_that_keep_at_once_succeed(tmp_path, model, monkeypatch):
    """The other one writes the same file, and tidies up, while this one's part is there."""
    data = open_data(asking_set(tmp_path / "set", 5))
    kept, other, parts = Kept(tmp_path / "f", "image", None), Kept(tmp_path / "f", "image", None), []
    flush = files._flush

    def meanwhile(file):
        parts.append(Path(file.name))
        if len(parts) == 1:
            image_features(model.encode_image, Images(data, SIZE, CPU), other)
            assert parts[0].exists() and not parts[1].exists()
        flush(file)

    monkeypatch.setattr(files, "_flush", meanwhile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_features(model.encode_image, Images(data, SIZE, CPU), kept)
    assert len(parts) == 2
    model.again()
    image_features(model.encode_image, Images(data, SIZE, CPU), kept)
    assert model.seen == []


class Many:
    """A set in memory, of one image many times, which is a member of a shard."""

    names, problems = ["many"], ()
    folder = Path("memory")

    def __init__(self, count):
        self.shard_sizes = [count]
        pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
        self.image = encoded(pixels, "PNG")

    def __len__(self):
        return self.shard_sizes[0]

    def image_bytes(self, i):
        return self.image

    def image_file(self, i):
        return None

    def shard_stamp(self, number):
        return "stamp"


def peak(count, folder) -> int:
    """The most bytes of Python and NumPy, which pixels are, at one time; the tower's own are not counted."""
    images = Images(Many(count), Pixels.of_size(96), CPU)
    tracemalloc.start()
    image_features(lambda pixels: pixels[:, 0, :4, 0], images, Kept(folder, "image", None) if folder else None)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("keep", [False, True])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch, keep):
    """700 images more would be 19 MB of pixels."""
    monkeypatch.setattr(images_module, "_BYTES", 1 << 21)
    folder = tmp_path if keep else None
    peak(10, None)
    few, many = peak(200, folder), peak(900, folder)
    assert few > 1 << 20 and many < few + 700 * 1000


def test_bars(tmp_path, model, capsys):
    path = asking_set(tmp_path / "set", 70)
    opened = {"one": open_set(path)}
    evaluate(model.subject, opened, features=tmp_path / "f")
    assert capsys.readouterr().err == ""
    next((tmp_path / "f/images").rglob("*.safetensors")).unlink()
    evaluate(model.subject, opened, features=tmp_path / "f", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("one: images: 70/70, ")  # of the texts none is missing
    evaluate(model.subject, opened, progress=True)
    texts, images = capsys.readouterr().err.splitlines()
    count = len(opened["one"].questions.texts())
    assert texts.startswith(f"one: texts: {count}/{count}, ") and images.startswith("one: images: 70/70, ")
    evaluate(model.subject, opened, features=tmp_path / "f", progress=True)
    assert capsys.readouterr().err == ""


def test_the_identity_of_an_images_features_is_the_models():
    identities = {subject_of(tiny_model(seed)).image_identity() for seed in (0, 1, 0)}
    assert len(identities) == 2 and subject_of(tiny_model()).text_identity() is None  # its encoder is not known


def identity_of(model):
    return subject_of(model).text_identity()


def of_text(model, **changes):
    """identity_of after changes to the description."""
    model.description = model.description | changes
    return identity_of(model)


def test_the_identity_of_a_frozen_encoders_features(tmp_path):
    """Equal for siblings, and for the same settings written out; another for each thing that changes a vector."""
    model, sibling = (small_model(tmp_path / name, "lift") for name in ("run", "sibling"))
    own, spec = identity_of(model), model.description["encoder"]
    assert own == identity_of(sibling) and subject_of(model).image_identity() != subject_of(sibling).image_identity()
    assert own == of_text(sibling, encoder=EncoderSpec(**spec).as_dict(), config={"lr": 1}, preset="tiny", vit={})
    assert own == of_text(sibling, encoder=spec | {"trust_remote_code": True})
    changes = [
        {"encoder": spec | setting}
        for setting in (
            {"prompt": "query: "},
            {"max_length": 16},
            {"pooling": "cls"},
            {"dtype": "bfloat16"},
            {"end_token": "</s>"},
            {"padding": "left"},
        )
    ]
    changes += [{"conditioning": {"power": power, "source_dim": 384, "sha256": "ab"}} for power in (0.5, 0.75)]
    changes += [{"conditioning": {"power": 0.5, "source_dim": 384, "sha256": "cd"}}, {"text_dim": 96}]
    changes += [{"rotation": {"seed": seed}} for seed in (1, 2)]
    original = dict(model.description)
    found = {own}
    for change in changes:
        model.description = original
        found.add(of_text(model, **change))
    assert len(found) == 1 + len(changes) and None not in found
    model.description = original
    assert of_text(model, encoder=spec | {"name": "none/such-model"}) is None  # it says so where it is needed
    assert of_text(model, encoder=None) is None


def test_the_files_of_an_encoder_in_a_folder_are_its_identity(tmp_path):
    folder = tmp_path / "encoder"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json", "modeling.py"):
        (folder / name).write_text("{}")
    model = small_model(tmp_path / "run", "lift")
    own = of_text(model, encoder={"name": str(folder)})
    shutil.copytree(folder, tmp_path / "copy")
    assert of_text(model, encoder={"name": str(tmp_path / "copy")}) == own
    found = {own}
    for name in ("model.safetensors", "1_Pooling/config.json", "modeling.py"):
        written_again(tmp_path / "copy" / name, b"[]")
        found.add(identity_of(model))
    assert len(found) == 4
    for name in (".git", "eval-features"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    assert of_text(model, encoder={"name": str(folder)}) == own


def test_a_hub_encoders_identity_is_its_commit(tmp_path, monkeypatch):
    model = small_model(tmp_path / "run", "lift")
    found = set()
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "hub/snapshots" / commit
        snapshot.mkdir(parents=True)
        monkeypatch.setattr(identity_module, "locate", lambda spec, download, at=snapshot: (str(at), None))
        found |= {of_text(model, encoder={"name": f"owner/{name}", "revision": "main"}) for name in ("one", "two")}
    assert len(found) == 4


def test_the_identity_of_clips_features_is_its_text_towers(tmp_path):
    model = small_model(tmp_path / "run", "clip")
    own, weights = identity_of(model), model.module.state_dict()
    found = {own}
    for name in ("text.token_embedding.weight", "text_projection.weight"):
        weights[name].view(-1)[0] += 1e-3
        found.add(identity_of(model))
    found |= {of_text(model, context=8), of_text(model, text={**model.description["text"], "heads": 1})}
    found.add(identity_of(model.to(dtype=torch.bfloat16)))
    assert len(found) == 6
    model = lift_fast.load(tmp_path / "run", device="cpu")
    model.module.visual_projection.weight.view(-1)[0] += 1e-3
    assert identity_of(model) == own


def test_where_features_are_kept_by_default(tmp_path, monkeypatch):
    model = tiny_model()
    run, weights = tmp_path / "run", tmp_path / "run/weights/step-1"
    weights.mkdir(parents=True)
    (tmp_path / "file.safetensors").write_bytes(b"")
    for source, folder in (
        (run, run),
        (weights, weights),
        ("owner/model", None),
        (tmp_path / "file.safetensors", None),
    ):
        model.source = str(source)
        assert features_folder(model) == (None if folder is None else folder / "eval-features")
    (run / "started.json").write_text("{}")
    for source in (run, weights):
        model.source = str(source)
        assert features_folder(model) == run / "eval-features"
    monkeypatch.chdir(weights)
    model.source = "."
    assert features_folder(model) == run / "eval-features"


def test_lift_fast_eval_keeps_features(tmp_path, monkeypatch, capsys):
    small_model(tmp_path / "run", "clip")
    path = asking_set(tmp_path / "set", 70)

    def run(*words):
        main(["eval", "--run", str(tmp_path / "run"), "--data", "set", str(path), "--device", "cpu", *words])
        said = capsys.readouterr()
        return said.out, said.err

    want, err = run("--no-keep")
    assert "set: texts: " in err and "set: images: 70/70" in err and not (tmp_path / "run/eval-features").exists()
    assert run("--batch-size", "16", "--features", str(tmp_path / "f"))[0] == want and (tmp_path / "f/images").is_dir()
    assert run()[0] == want and (tmp_path / "run/eval-features/texts").is_dir()

    def refuse(*arguments):
        raise AssertionError("the text encoder is loaded")

    monkeypatch.setattr("lift_fast.run_folder.text_encoder", refuse)
    monkeypatch.setattr("lift_fast.nn.models.Clip.encode_image", refuse)
    assert run() == (want, "")
    monkeypatch.undo()
    file = tmp_path / "run/model.safetensors"
    main(["eval", "--run", str(file), "--data", "set", str(path), "--device", "cpu"])
    said = capsys.readouterr()
    assert f"features are not kept: {file} is no folder; name one with --features" in said.err and said.out == want
    with pytest.raises(SystemExit):
        run("--batch-size", "0", "--no-keep")
    assert "batch_size is 0; it must be at least 1 image" in capsys.readouterr().err


def test_quiet(tmp_path, capsys):
    small_model(tmp_path / "run", "clip")
    path = asking_set(tmp_path / "set", 3)
    main(["--quiet", "eval", "--run", str(tmp_path / "run"), "--data", "set", str(path), "--device", "cpu"])
    assert capsys.readouterr().err == ""
    progress.configure()
