"""What attention refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnarch import functional as F

_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"query": torch.ones(1, 2, 3, 4, dtype=torch.int64)}, "query must be floating"),
    "dtypes": ({"key": torch.ones(1, 2, 5, 4).double()}, "key must be torch.float32"),
    "depth": ({"key": torch.ones(1, 2, 5, 3)}, r"key must have shape \(1, 2, 5, 4\)"),
    "length": ({"value": torch.ones(1, 2, 6, 4)}, r"value must have shape \(1, 2, 5, 4\)"),
    "batch": (
        {"query": torch.ones(3, 2, 3, 4), "key": torch.ones(2, 2, 5, 4)},
        "key must have shape",
    ),
    "heads": ({"query": torch.ones(1, 4, 3, 4)}, "enable_gqa=True"),
    "sharing": ({"query": torch.ones(1, 3, 3, 4), "enable_gqa": True}, "must be a multiple"),
    "dimensions": ({"key": torch.ones(4)}, "as many dimensions"),
    "mask shape": ({"attn_mask": torch.ones(3, 4)}, "mask must broadcast"),
    "mask dtype": ({"attn_mask": torch.ones(3, 5).long()}, "mask must be bool"),
    "lengths": ({"key_lengths": torch.ones(2).long()}, r"key_lengths must have shape \(1,\)"),
    "lengths dtype": ({"key_lengths": torch.ones(1)}, "must be whole numbers"),
    "dropout": ({"dropout_p": 1.5}, "between 0 and 1"),
    "window": ({"window": 0}, "window must be"),
    "window type": ({"window": "a"}, "window must be an int or two"),
    "offset type": ({"query_offset": 1.5}, "query_offset must be an int"),
    "no key": ({"key": None}, "key must be a tensor, got NoneType"),
    "a list as a mask": ({"attn_mask": [[1]]}, "attn_mask must be a tensor, got list"),
    "a list of lengths": ({"key_lengths": [1]}, "key_lengths must be a tensor, got list"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input(name: str) -> None:
    change, message = _BAD[name]
    good = {"query": torch.ones(1, 2, 3, 4)} | dict.fromkeys(
        ("key", "value"), torch.ones(1, 2, 5, 4)
    )
    with pytest.raises((ValueError, TypeError), match=message):
        F.scaled_dot_product_attention(**good | change)
