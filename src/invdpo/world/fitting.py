"""The plain training loop shared by everything that the world fits: warm-up, cosine decay, averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    averaging: float = 0.999,
    weight_decay: float = 0.01,
) -> dict[str, float]:
    """Minimise `loss(step)` over the model's parameters and leave their exponential average in the model.

    Returns steps, minutes and the mean loss of the last hundredth of the steps.
    """
    started = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    average = copy.deepcopy(model)
    recent: list[float] = []
    bar = tqdm(range(steps), desc=name, mininterval=5.0, ncols=100)
    for step in bar:
        warm_up = min(1.0, (step + 1) / 200)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * decay
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # The average starts short, so that it does not remember the initial weights.
        keep = min(averaging, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        if step % 20 == 0 or step >= steps - max(20, steps // 100):
            recent = [*recent, value.item()][-max(20, steps // 100) :]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
    model.load_state_dict(average.state_dict())
    return {
        "steps": steps,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "final_loss": round(sum(recent) / len(recent), 5),
    }


def random_batches(size: int, batch: int, seed: int) -> Callable[[], Tensor]:
    """A function that draws indices (batch,) in 0..size-1, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(size, (batch,), generator=generator)
