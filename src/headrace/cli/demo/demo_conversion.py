"""Turn a GGUF file into a bfloat16 safetensors checkpoint: `python -m headrace.cli.demo.demo_conversion IN.gguf OUT`.

A program of its own, because the conversion holds the whole model in memory, which the demo then must not.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


def convert(gguf: Path, checkpoint: Path) -> None:
    """Write model and tokenizer of `gguf` to `checkpoint`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(checkpoint)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
