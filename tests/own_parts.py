"""The examples of docs/how_to/own_parts.md as modules, as a user would copy them."""

import re

from processes import ROOT

PAGE = ROOT / "docs" / "how_to" / "own_parts.md"


def examples():
    """Returns the code of each example by the name of its file."""
    blocks = re.findall(r"```python\n(# (\w+)\.py.*?)```", PAGE.read_text(), re.DOTALL)
    return {name: code for code, name in blocks}


def write_examples(folder):
    """Writes a module for each example, the dataset's as an installed package would be."""
    for name, code in examples().items():
        path = folder / f"{name}.py"
        if name == "my_dataset":
            path = folder / "site-packages" / name / "__init__.py"
            path.parent.mkdir(parents=True)
        path.write_text(code)
    return f"{folder}:{folder / 'site-packages'}"


# A tiny run with all three.
CONFIG = (
    "--config=digits",
    "--config.backbone.name=patches",
    "--config.backbone.options={'width': 24}",
    "--config.objective.name=uniformity",
    "--config.objective.options={'temperature': 1.0}",
    "--config.dataset.name=stripes",
    "--config.dataset.options={'count': 96}",
    "--config.batch_size=32",
    "--config.crop.size=16",
    "--config.crop.eval_resize=16",
    "--config.num_epochs=2",
    "--config.optimizer.warmup_epochs=1",
    "--config.linear_eval.num_epochs=2",
    "--config.linear_eval.batch_size=32",
    "--config.tensorboard=false",
)
IMPORT = "--import=my_backbone,my_objective,my_dataset"
