"""lift-fast export: the folder, what is printed, and an upload that happens only when it is asked for."""

import json
import shlex
from types import SimpleNamespace
from typing import get_args

import huggingface_hub
import pytest
from support.small_models import small_model

import lift_fast
from lift_fast.cli.export import TargetName
from lift_fast.cli.main import main
from lift_fast.export import TARGETS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    small_model(folder, "lift", layers=1)
    return folder


class Hub:
    """In place of huggingface_hub.HfApi: keeps what it is asked for."""

    calls: list
    public = False
    error: Exception | None = None

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{name}"

    def model_info(self, name):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))
        for config in folder_path.glob("open_clip_config.json"):
            self.calls.append(("placed", json.loads(config.read_text())["model_cfg"]["vision_cfg"]["timm_model_name"]))


@pytest.fixture
def hub(monkeypatch):
    class Stub(Hub):
        calls: list = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return Stub


def export(command: str) -> None:
    main(["export", *shlex.split(command)])


def error_of(capfd, command: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        export(command)
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "lift-fast: error" in line]
    return line


def test_the_targets_are_those_of_the_package():
    assert get_args(TargetName) == tuple(TARGETS)


def test_export(run, tmp_path, hub, capfd):
    out = tmp_path / "out"
    export(f"{run} --to safetensors --out {out} --names dog cat --licence cc-by-4.0")
    assert capfd.readouterr().out.splitlines() == [
        "the weights are float32, under the names of lift_fast.nn; config.json says what they compute",
        f"written to {out}",
    ]
    names = {"README.md", "classes.npz", "config.json", "lift_fast.json", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == names
    assert 'license: "cc-by-4.0"' in (out / "README.md").read_text()
    assert lift_fast.load(out, device="cpu").description["text_dim"] == 384
    assert not hub.calls


def test_another_encoder_is_recorded(run, tmp_path):
    export(f"{run} --to safetensors --out {tmp_path}/out --encoder owner/model")
    about = json.loads((tmp_path / "out" / "lift_fast.json").read_text())
    assert about["run"]["encoder"]["name"] == "owner/model"


@pytest.mark.parametrize("private", [False, True])
def test_push(run, tmp_path, hub, private, capfd):
    export(f"{run} --to safetensors --out {tmp_path}/out --push me/model {'--private' if private else ''}")
    files = ["README.md", "config.json", "lift_fast.json", "model.safetensors"]
    assert hub.calls == [("create", "me/model", private, True), ("upload", "me/model", files)]
    assert capfd.readouterr().out.endswith("uploaded to https://huggingface.co/me/model\n")


def test_a_folder_that_says_where_it_is(run, tmp_path, hub):
    export(f"{run} --to open_clip --out {tmp_path}/out --push me/model")
    assert hub.calls[-1] == ("placed", "hf-hub:me/model")
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == f"local-dir:{tmp_path}/out"


def test_a_public_model_does_not_become_private(run, tmp_path, hub, capfd):
    hub.public = True
    error = error_of(capfd, f"{run} --to safetensors --out {tmp_path}/out --push me/model --private")
    assert "is public, so --private is not kept; nothing was uploaded" in error
    assert [call[0] for call in hub.calls] == ["create"]


@pytest.mark.parametrize("error", [ConnectionError("no route"), OSError("401 unauthorised\nmore")])
def test_a_failed_push_leaves_the_export(run, tmp_path, hub, error, capfd):
    hub.error = error
    said = error_of(capfd, f"{run} --to safetensors --out {tmp_path}/out --push me/model")
    assert f"the hub did not take me/model: {str(error).splitlines()[0]}; log in with `hf auth login`" in said
    assert said.endswith(f"hf upload me/model {tmp_path}/out") and (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "https://huggingface.co/a/b"])
def test_names_that_the_hub_does_not_have(run, tmp_path, hub, name, capfd):
    command = f"{run} --to safetensors --out {tmp_path}/out --push {shlex.quote(name)}"
    assert "--push takes a name on the Hugging Face hub, owner/model" in error_of(capfd, command)
    assert not hub.calls and not (tmp_path / "out").exists()


def test_private_without_push(run, tmp_path, capfd):
    assert "--private is about an upload" in error_of(capfd, f"{run} --to onnx --out {tmp_path}/out --private")


def test_bad_input_leaves_nothing(run, tmp_path, capfd):
    assert "two different names" in error_of(capfd, f"{run} --to safetensors --out {tmp_path}/out --names dog")
    assert "no model at" in error_of(capfd, f"{tmp_path}/none --to safetensors --out {tmp_path}/out")
    assert not any(tmp_path.iterdir())
