"""Tars, indexes and tables that are damaged, or altered by somebody who means it: an error or a right answer.

`make campaign` takes hundreds of each; `make test` a few. Seeds are fixed.
"""

import io
import json
import random
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from support.indexes import forge
from support.judged import judged, judged_command

from lift_fast.data.index import INDEX, build_index
from lift_fast.data.open import open_data
from lift_fast.data.options import DataOptions
from lift_fast.data.samples import BadSample
from lift_fast.errors import LiftFastError

SAMPLES, PER_TAR = 12, 4
BOTH = (LiftFastError, BadSample)


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (20 * number, 5, 7)).save(out, "PNG")
    return out.getvalue()


def key_of(number: int) -> str:
    return f"k{number:03d}"


def caption_of(number: int) -> str:
    return f"caption number {number}, of the sample {key_of(number)}"


def write_tars(folder: Path) -> list[tuple[str, str, bytes]]:
    """Writes tars. Returns key, caption and image of each sample."""
    folder.mkdir(parents=True)
    samples = [(key_of(k), caption_of(k), picture(k)) for k in range(SAMPLES)]
    for start in range(0, SAMPLES, PER_TAR):
        with tarfile.open(folder / f"{start // PER_TAR:05d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for key, caption, image in samples[start : start + PER_TAR]:
                meta = json.dumps({"long": key}).encode()
                for suffix, data in ("png", image), ("txt", caption.encode()), ("json", meta):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    if key == "k002":
                        info.pax_headers = {"comment": "x" * 700}
                    tar.addfile(info, io.BytesIO(data))
    return samples


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one or a few faults of disks, networks and people."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(max(1, len(out)))
        kind = rng.randrange(9)
        if kind <= 2 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at : at + 512] = bytes(len(out[at : at + 512]))
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.choice([1, 512]))
        elif kind == 6:
            del out[at : at + rng.choice([1, 4, 512])]
        elif kind == 7:
            size = rng.choice([4, 8])
            out[at : at + size] = rng.choice([b"\xff", b"\0", b"\x7f", b"9"]) * size
        else:
            other = rng.randrange(max(1, len(out)))
            out[at : at + 512] = out[other : other + 512]
    return bytes(out)


def read_all(path: Path, options: DataOptions, fields=("txt", "long")):
    """Everything that can be read of a set: (key, caption, image) of the samples whose three are there."""
    samples = open_data(path, options=options)
    assert sum(samples.shard_sizes) == len(samples) < 1 << 24
    found, first = [], 0
    for number, size in enumerate(samples.shard_sizes):
        keys = samples.shard_keys(number)
        assert len(keys) == len(samples.shard_hashes(number)) == len(samples.captions(number, fields[0])) == size
        samples.bad_keys(number)
        samples.shard_stamp(number)
        for row, key in enumerate(keys[:100], first):
            assert samples.where(row)
            try:
                found.append((key, samples.caption(row, fields[0]), samples.image_bytes(row)))
                samples.meta(row)
            except BadSample as error:
                assert error.reason
        first += size
    return found


# indexes


def index_cases(folder: Path, number: int, part: int):
    """Yields a name and a function that writes an index which is damaged in a way of its own."""
    path = folder / INDEX
    whole = path.read_bytes()
    directory = int.from_bytes(whole[-32:-24], "little")
    rng = random.Random(part)

    def flipped():
        at = rng.randrange(len(whole))
        return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]

    for trial in range(number):
        kind = trial % 5
        if kind < 2:
            path.write_bytes(flipped())
        elif kind == 2:
            path.write_bytes(damaged(whole, rng))
        else:
            path.write_bytes(whole)
            at = rng.randrange(8, directory)
            numbers = [struct.pack("<q", number) for number in (-2, 1 << 62, 512)]
            new = rng.choice([rng.randbytes(8), b"\xff" * 8, bytes(8), *numbers])

            def alter(content, kind=kind):
                tar = rng.choice(content["tars"])
                if kind == 4:
                    field = rng.randrange(len(tar))
                    tar[field] = rng.choice([-1, 1 << 70, 1e300, None, "x", [], {}, tar[field], True, [["x", "y", 1]]])

            forge(path, at, new[: directory - at], alter)
        yield kind
    path.write_bytes(whole)


def try_indexes(tmp_path, tally, number, part):
    samples = write_tars(tmp_path / "set")
    build_index(tmp_path / "set", 1, progress=False)
    for trial, kind in enumerate(index_cases(tmp_path / "set", number, part)):
        options = DataOptions(skip_bad=trial % 2 == 0)

        def read(kind=kind, options=options):
            found = read_all(tmp_path / "set", options)
            # A forged checksum may say anything of where a sample lies, as its tar may; but only inside of it.
            assert kind > 2 or found == samples

        tally("index", judged(read, BOTH, seconds=20).outcome)
    if part == 0:
        whole = (tmp_path / "set" / INDEX).read_bytes()
        for at in (10, 200, len(whole) - 40):
            (tmp_path / "set" / INDEX).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert judged_command(["data", "check", tmp_path / "set"]).outcome == "error"
            tally("index", "error")


@pytest.mark.attack
def test_some_damaged_indexes(tmp_path, tally):
    try_indexes(tmp_path, tally, 15, 0)


@pytest.mark.campaign
@pytest.mark.parametrize("part", [1, 2])
def test_damaged_indexes(tmp_path, tally, part):
    try_indexes(tmp_path, tally, 160, part)


# tars


def headers(data: bytes) -> list[int]:
    """Where headers begin in a tar that is whole."""
    found, at = [], 0
    while any(header := data[at : at + 512]):
        found.append(at)
        size = int(header[124:136].split(b"\0")[0].strip() or b"0", 8)
        at += 512 + size + -size % 512
    return found


def with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def try_tars(tmp_path, tally, number, part):
    samples = write_tars(tmp_path / "set")
    by_key = {key: (key, caption, image) for key, caption, image in samples}
    path, rng = tmp_path / "set" / "00001.tar", random.Random(part)
    whole = path.read_bytes()
    begins = headers(whole)
    for trial in range(number):
        kind = trial % 4
        if kind == 0:  # in a header, without its checksum
            at = rng.choice(begins) + rng.randrange(512)
            data = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        elif kind == 1:
            data = whole[: rng.randrange(len(whole))]
        elif kind == 2:
            data = damaged(whole, rng)
        else:  # in a header, with its checksum
            at = rng.choice(begins)
            header = bytearray(whole[at : at + 512])
            field, size = rng.choice([(124, 12), (156, 1), (0, 20), (257, 6), (345, 50)])
            kinds = b"xgLKS12567"[rng.randrange(10) :] * 12
            new = rng.choice([b"\x80" + b"\xff" * size, b"7" * size, rng.randbytes(size), kinds])
            header[field : field + size] = new[:size].ljust(size, b"\0")
            data = whole[:at] + with_checksum(bytes(header)) + whole[at + 512 :]
        path.write_bytes(data)
        options = DataOptions(skip_bad=trial % 2 == 0)

        def read(kind=kind, options=options):
            found = read_all(tmp_path / "set", options)
            if kind < 2:
                assert all(by_key[key] == (key, caption, image) for key, caption, image in found)

        outcome = judged(read, BOTH, seconds=20).outcome
        if trial % 8 == 4:
            outcome = judged_command(["data", rng.choice(["check", "stats", "index"]), tmp_path / "set"]).outcome
            (tmp_path / "set" / INDEX).unlink(missing_ok=True)
        tally("tar", outcome)


@pytest.mark.attack
def test_some_damaged_tars(tmp_path, tally):
    try_tars(tmp_path, tally, 16, 0)


@pytest.mark.campaign
@pytest.mark.parametrize("part", [1, 2])
def test_damaged_tars(tmp_path, tally, part):
    try_tars(tmp_path, tally, 150, part)


# tables

ODD: tuple = (None, True, 7, -1, 1 << 70, 1.5, float("nan"), [], ["a"], {}, {"a": 1}, [[]])
ODD += ("", " ", "\ud800", "a\0b", "../x", "x" * 10_000)


def plain_rows():
    return [{"key": key_of(k), "image": f"{key_of(k)}.png", "caption": caption_of(k)} for k in range(SAMPLES)]


def write_table(path: Path, rows, rng: random.Random) -> None:
    """Writes rows; of parquet and Arrow with images in them, every second time."""
    kind = path.suffix
    if kind in (".parquet", ".arrow"):
        rows = [dict(row) for row in rows]
        if rng.random() < 0.5:
            rows = [{**row, "image": {"bytes": picture(k), "path": None}} for k, row in enumerate(rows)]
        table = pa.Table.from_pylist(rows)
        if kind == ".parquet":
            parquet.write_table(table, path, row_group_size=5, compression=rng.choice(["none", "snappy", "zstd"]))
        else:
            make = rng.choice([pa.ipc.new_stream, pa.ipc.new_file])
            with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
                writer.write_table(table, 5)
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        mark = "\t" if kind == ".tsv" else ","
        quote = '"' if mark == "," else ""
        lines = [mark.join(rows[0])]
        lines += [mark.join(f"{quote}{value}{quote}" for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")


def try_tables(tmp_path, tally, kind, number, part):
    folder, rng = tmp_path / "set", random.Random(100 * part + len(kind))
    folder.mkdir()
    for k in range(SAMPLES):
        (folder / f"{key_of(k)}.png").write_bytes(picture(k))
    path = folder / f"t.{kind}"
    for trial in range(number):
        write_table(path, plain_rows(), rng)
        whole = path.read_bytes()
        if kind == "jsonl" and trial % 2:  # right JSON of other types
            rows = plain_rows()
            for _ in range(3):
                rng.choice(rows)[rng.choice(["key", "image", "caption", "other"])] = rng.choice(ODD)
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            path.write_bytes(damaged(whole, rng))
        options = DataOptions(skip_bad=trial % 3 == 0)
        outcome = judged(lambda options=options: len(read_all(path, options)), BOTH, seconds=20).outcome
        if trial % 8 == 4:
            outcome = judged_command(["data", rng.choice(["check", "stats"]), path]).outcome
        tally("table", outcome)


KINDS = ("csv", "tsv", "jsonl", "parquet", "arrow")


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_tables(tmp_path, tally, kind):
    try_tables(tmp_path, tally, kind, 5, 0)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tables(tmp_path, tally, kind):
    try_tables(tmp_path, tally, kind, 60, 1)
