"""What CONTRIBUTING.md shows works as it stands there."""

import re
from pathlib import Path

from tests.tiny_config import tiny
from vit_jax.models.registry import build_model
from vit_jax.objectives import registry
from vit_jax.training import trainer

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def test_the_example_of_an_objective_is_short_and_trains(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) < 80
    module = {"__name__": "rotations"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), module)
    build = lambda config, classes, b: module["Rotations"](build_model(config, 0, b))
    monkeypatch.setitem(registry.OBJECTIVES, "rotations", build)
    config = tiny(total_steps=16.0)
    config.objective.name = "rotations"
    config.data.mixup = 0.0
    config.model.representation_size = None
    config.optimizer.lr = 0.003
    result = trainer.train(config, tmp_path)
    assert result["eval/count"] == 360
    assert result["eval/accuracy"] > 0.35  # of four classes
