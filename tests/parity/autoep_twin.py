"""Run DeepSpeed's AutoEP layers of a checkpoint in a process of its own: an independent twin.

`python -m tests.parity.autoep_twin CHECKPOINT OUT` writes, for every layer, random hidden states,
the output of its `AutoEPMoELayer` and what its `TokenChoiceTopKRouter` chose. AutoEP wants a
process group; a gloo world of one will do. The shared-memory all-reduce that deepspeed compiles on
first use takes minutes and is of no use to one process, so it is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_TOKENS = 9


def main(checkpoint: str, out: str) -> None:
    """Write the twin's answers to `out`."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed.comm
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from transformers import AutoModelForCausalLM

    # Not `deepspeed.comm.torch`: that name is torch itself by now.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    torch.set_num_threads(1)
    store = Path(tempfile.mkdtemp(dir=Path(out).parent)) / "rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    deepspeed.comm.init_distributed("gloo", verbose=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    converter = AutoEP(model, AutoEPConfig(enabled=True, autoep_size=1))
    for spec in converter.ep_parser():
        converter._replace_moe_layer_without_retarget(spec, 1, 0)
    layers = [m for m in model.modules() if type(m).__name__ == "AutoEPMoELayer"]
    answers: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        for layer_id, layer in enumerate(layers):
            layer.set_deepspeed_parallelism()
            hidden = torch.randn(1, NUM_TOKENS, layer.hidden_size, generator=generator)
            output = layer(hidden)
            weights, ids, *_ = layer.router(hidden[0])
            answers |= {
                f"{layer_id}.hidden": hidden[0],
                f"{layer_id}.output": (output[0] if isinstance(output, tuple) else output)[0],
                f"{layer_id}.weights": weights.float(),
                f"{layer_id}.ids": ids.int(),
            }
    save_file({name: value.contiguous().clone() for name, value in answers.items()}, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
