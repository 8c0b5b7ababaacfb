"""Inputs that the tests of mixtures of experts share."""

import pytest
import torch
from torch import Tensor

from tests.moe.cases import VOCABULARY, WIDTH


@pytest.fixture
def x() -> Tensor:
    return torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(4))
