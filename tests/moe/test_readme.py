"""moe/README.md: its router works as printed, and the files it names exist."""

import re
from pathlib import Path

import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe import routers
from open_lm.moe.layer import MoE
from open_lm.moe.routing import sort_by_expert

ROOT = Path(__file__).parents[2]
README = (ROOT / "moe" / "README.md").read_text()


def test_the_printed_router_routes(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {"torch": torch, "sort_by_expert": sort_by_expert}
    exec(code, scope)
    monkeypatch.setitem(routers.ROUTERS, "round_robin", scope["round_robin"])
    moe = MoEConfig(dim=8, num_experts=4, top_k=1, router="round_robin")  # type: ignore[arg-type]
    layer = MoE(moe)
    y_BSD, stats = layer(torch.randn(2, 8, 8))
    assert y_BSD.shape == (2, 8, 8)
    assert stats.count_E.tolist() == [4, 4, 4, 4]


def test_named_files_exist():
    named = re.findall(r"open_lm/[\w/]+(?:\.py|/)", README)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []
