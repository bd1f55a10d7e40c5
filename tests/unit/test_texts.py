"""What scorers remember of prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invdpo.scorers import texts
from invdpo.scorers.texts import Texts


class Tower:
    """Embeds a prompt as its length and first letter, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> Tensor:
        self.asked.append(prompts)
        return torch.tensor([[len(prompt), ord(prompt[0])] for prompt in prompts], dtype=torch.float32)


def test_a_prompt_is_embedded_once_and_rows_keep_their_order() -> None:
    tower = Tower()
    embed = Texts(tower)
    first = embed(["red", "blue", "red"])
    second = embed(["green", "blue"])
    assert tower.asked == [["red", "blue"], ["green"]]
    assert torch.equal(first, Tower()(["red", "blue", "red"]))
    assert torch.equal(second, Tower()(["green", "blue"]))


def test_memory_is_bounded_and_forgetting_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "KEPT", 3)
    tower = Tower()
    embed = Texts(tower)
    embed(["a", "b"])
    assert torch.equal(embed(["b", "c", "d"]), Tower()(["b", "c", "d"]))
    assert tower.asked[-1] == ["b", "c", "d"], "nothing is kept beyond the bound, so `b` is embedded again"
    embed(["d"])
    assert len(tower.asked) == 2
    embed.forget()
    embed(["d"])
    assert tower.asked[-1] == ["d"] and len(tower.asked) == 3
    many = [str(number) for number in range(5)]
    assert torch.equal(embed(many), Tower()(many)), "more prompts in a call than are kept"
