"""The moving average and the schedule."""

import pytest
import torch

from trainer.engine.optim import AdamW, build_schedule
from trainer.engine.settings import Train


def test_the_moving_average() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = AdamW([{"params": list(model.parameters())}], ema_decay=0.5, lr=0.1)
    expected = None
    for step in range(1, 6):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = model.weight.detach().clone() if step == 1 else expected.lerp(model.weight.detach(), 1 - decay)
    torch.testing.assert_close(optimizer.state[model.weight]["ema"], expected)


def test_the_schedule_is_a_function_of_the_step() -> None:
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}], lr=1.0)
    schedule = build_schedule(optimizer, Train(lr=1.0, warmup_steps=10, min_lr=0.1), steps=110)

    def lr(step: int) -> float:
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    assert [lr(0), lr(5), lr(10)] == pytest.approx([0, 0.25, 0.5])
    assert lr(60) == pytest.approx(0.5 * 0.55)
    assert lr(110) == pytest.approx(0.5 * 0.1)
    assert lr(5) == pytest.approx(0.25)
