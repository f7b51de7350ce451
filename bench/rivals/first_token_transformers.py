"""Rival: the few lines that one writes with plain transformers. Loads everything, generates one token, prints it."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Take the checkpoint's directory and the prompt from the command line."""
    directory, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    print(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :]), flush=True)


if __name__ == "__main__":
    main()
