"""docs/recipes.md: runs each block unchanged and compares its loss and gradients with the other library's."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lift_fast.cache import encode

RECIPES = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def recipe(heading: str) -> dict:
    """The names that the blocks under a heading define."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", RECIPES, re.M | re.S)
    assert section, heading
    blocks = re.findall(r"^```python\n(.*?)^```$", section.group(1), re.M | re.S)
    assert blocks, heading
    names: dict = {}
    for block in blocks:
        exec(block, names)
    return names


def unit(rows: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).requires_grad_()


def same_gradients(losses: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Asserts that two losses are equal up to rounding, and so are their gradients for every leaf."""
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses)
    assert any(grad is not None for grad in theirs)
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, rtol=1e-3, atol=1e-6)


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip's loss.py and create_loss, without the rest of the package, whose import needs torchvision."""
    try:
        package = metadata.distribution("open_clip_torch")
    except metadata.PackageNotFoundError:
        pytest.skip("open_clip is not installed (`pip install --no-deps open_clip_torch` is enough here)")
    losses, factory = (Path(str(package.locate_file(f"open_clip/{name}.py"))) for name in ("loss", "factory"))
    module = ModuleType("open_clip.factory")
    exec(losses.read_text(), module.__dict__)
    tree = ast.parse(factory.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "create_loss"]
    exec(compile(tree, str(factory), "exec"), module.__dict__)
    parent = ModuleType("open_clip")
    parent.factory = module
    monkeypatch.setitem(sys.modules, "open_clip", parent)
    monkeypatch.setitem(sys.modules, "open_clip.factory", module)
    return module


@pytest.mark.parametrize("siglip", [False, True])
def test_open_clip(open_clip, siglip):
    settings = {"local_loss": False, "gather_with_grad": False, "loss_dist_impl": None, "horovod": False}
    args = SimpleNamespace(distill=False, model="ViT-B-32", siglip=siglip, rank=0, world_size=1, **settings)
    theirs = open_clip.create_loss(args)
    recipe("open_clip")
    ours = open_clip.create_loss(args)
    assert type(ours).__module__.startswith("lift_fast")
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    batch = {"image_features": unit(33, 24), "text_features": unit(33, 24), "logit_scale": scale}
    batch |= {"logit_bias": bias} if siglip else {}
    # This is how open_clip_train calls a loss.
    losses = [loss(**batch, output_dict=True)["contrastive_loss"] for loss in (ours, theirs)]
    same_gradients(losses, list(batch.values()))


def test_sentence_transformers():
    peer = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    class Bag(nn.Module):
        """Stands in for a SentenceTransformer."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(50, 24)

        def forward(self, features: dict) -> dict:
            return features | {"sentence_embedding": self.tokens(features["input_ids"]).mean(1)}

    names, model = recipe("sentence-transformers"), Bag()
    columns = [{"input_ids": torch.randint(50, (33, 5))} for _ in range(2)]
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = peer.MultipleNegativesRankingLoss(model, **both)
    embeddings = [model(column)["sentence_embedding"] for column in columns]
    loss = theirs.compute_loss_from_embeddings(embeddings, None)
    same_gradients([names["FusedRankingLoss"](model)(columns, None), loss], list(model.parameters()))

    table, labels = encode(torch.randn(80, 24), "int8"), torch.randperm(80)[:33]
    for rows in (table.__getitem__, table.widen().__getitem__):
        anchors = model(columns[0])["sentence_embedding"]
        loss = theirs.compute_loss_from_embeddings([anchors, table.widen()[labels]], None)
        frozen = names["FrozenRankingLoss"](model, rows)(columns[:1], labels)
        same_gradients([frozen, loss], list(model.parameters()))


@pytest.mark.parametrize("frozen", [False, True])
def test_hugging_face_clip_model(frozen):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 60, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 59}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=24)
    model = CLIPModel(config).eval()
    for part in (model.text_model, model.text_projection):
        part.requires_grad_(not frozen)
    batch = {
        "pixel_values": torch.randn(13, 3, 16, 16),
        "input_ids": torch.cat([torch.randint(1, 59, (13, 8)), torch.full((13, 1), 59)], dim=1),
        "attention_mask": torch.ones(13, 9, dtype=torch.long),
    }
    losses = [recipe("Hugging Face CLIPModel")["clip_loss"](model, **batch), model(**batch, return_loss=True).loss]
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert (model.text_projection.weight in set(leaves)) is not frozen
    same_gradients(losses, leaves)
