"""Claim: stacks are written over only where nothing else reads them, and no two elements are one number."""

from typing import ClassVar

import torch

from tests.support.rules import RuleTests

VECTOR = (6,)


class TestOverwriting(RuleTests):
    operations: ClassVar = {
        "added to itself": (lambda x: torch.sin(torch.add(x, x, alpha=2)), VECTOR),
        "subtracted from itself": (lambda x: torch.sin(torch.sub(x, x, alpha=3)), VECTOR),
        "subtracted from a multiple of itself": (lambda x: torch.sin(torch.rsub(x, x, alpha=3)), VECTOR),
        "overlapping windows, scaled": (lambda x: torch.sin(torch.tanh(x.unfold(1, 3, 1)).flatten(1)), VECTOR),
        "expanded and rectified": (
            lambda x: torch.sin(torch.relu(x.unsqueeze(1).expand(-1, 2, -1)).flatten(1)),
            VECTOR,
        ),
    }
