"""LIFT's head: maps image features to the frozen text encoder's space (arXiv 2506.04209, section 3)."""

from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """Linear(width -> text_dim), GELU, Linear(text_dim -> text_dim): [batch, width] -> [batch, text_dim]."""

    def __init__(self, width: int, text_dim: int):
        super().__init__()
        self.fc_1 = nn.Linear(width, text_dim)
        self.fc_2 = nn.Linear(text_dim, text_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_2(F.gelu(self.fc_1(x)))
