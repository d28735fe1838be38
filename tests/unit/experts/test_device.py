"""deepspeed is load-bearing: a group without it does not start, and says why."""

from __future__ import annotations

import subprocess
import sys

import psutil
import torch

from experts import device

WITHOUT_DEEPSPEED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from experts.runtime import ExpertRuntime
from protos.errors import ConfigurationError
try:
    ExpertRuntime(group_id="a", checkpoint="/nowhere")
except ConfigurationError as error:
    print(error)
    sys.exit(3)
"""


def test_a_group_without_deepspeed_does_not_start() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 3, ended.stderr
    assert "environment.deepspeed must be importable" in ended.stdout
    assert "No module named 'deepspeed" in ended.stdout
    assert "pip install deepspeed==0.19.8" in ended.stdout


START_OF_A_GROUP = """
import sys
import experts.service, experts.weights
assert "deepspeed" not in sys.modules
import torch
from experts.compute import DeepSpeedCompute, ExpertShape
shape = ExpertShape(
    num_layers=1, num_experts=4, hidden_size=16, intermediate_size=8, dtype=torch.bfloat16
)
DeepSpeedCompute(shape, use_grouped_mm=False).reserve(0, 4)
assert "deepspeed" in sys.modules
assert "sympy" not in sys.modules, "torch imports it for half a second"
"""


def test_a_group_imports_deepspeed_late_and_sympy_never() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", START_OF_A_GROUP], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr


def test_the_device_of_a_machine_without_accelerator_is_the_cpu() -> None:
    if torch.cuda.is_available():
        return
    assert device.current_device() == torch.device("cpu")
    assert 0 < device.available_bytes() <= psutil.virtual_memory().total
    device.synchronize()
