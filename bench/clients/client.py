"""One client in its own process: the same work on a resident and on a streamed model, compared for equality.

python client.py CLIENT DIR SHARE

Runs in the environment that run_clients.py builds; the last line of its output is JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import headrace

QUESTIONS = ["Name three rivers of Europe.", "What is the capital of France? Answer in one word."]
CONTINUED = [("The capital of France is", " Paris"), ("The capital of France is", " a river."), ("2 + 2 =", " 4")]
TEXT = "A mill stood at the end of the valley. Its wheel was driven by a headrace, a channel that left the river above."
GREEDY: dict[str, Any] = {"min_new_tokens": 12, "max_new_tokens": 24, "do_sample": False}


def lm_eval(model: Any, tokenizer: Any) -> Any:
    """Log-likelihoods of several continuations, and of a whole text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128)

    def asked(kind: str, arguments: tuple[str, ...]) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    likelihoods = harness.loglikelihood([asked("loglikelihood", pair) for pair in CONTINUED], disable_tqdm=True)
    rolling = harness.loglikelihood_rolling([asked("loglikelihood_rolling", (TEXT,))], disable_tqdm=True)
    return [[*map(list, likelihoods)], list(rolling)]


def text_pipeline(model: Any, tokenizer: Any) -> Any:
    """A chat, and several prompts in one batch."""
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = generate([{"role": "user", "content": QUESTIONS[0]}], **GREEDY)
    return [chat, generate(QUESTIONS, batch_size=2, **GREEDY)]


def outlines(model: Any, tokenizer: Any) -> Any:
    """An answer out of three, and JSON of a schema."""
    import outlines
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        inhabitants: int

    generate = outlines.from_transformers(model, tokenizer)
    chosen = generate(QUESTIONS[1], Literal["Rome", "Paris", "Lima"], max_new_tokens=8, do_sample=False)
    return [chosen, generate("Describe Paris as JSON.", City, max_new_tokens=48, do_sample=False)]


def peft(model: Any, tokenizer: Any) -> Any:
    """Logits and text with an adapter of random weights, and logits with it switched off."""
    from peft import LoraConfig, get_peft_model

    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    with torch.inference_mode():
        with_adapter = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
    assert not torch.equal(with_adapter, without), "the adapter changes nothing"
    return [with_adapter.tolist(), without.tolist(), adapted.generate(input_ids=ids, **GREEDY).tolist()]


def langchain(model: Any, tokenizer: Any) -> Any:
    """Answers of a chain, at once and as a stream."""
    from langchain_core.prompts import PromptTemplate
    from langchain_huggingface import HuggingFacePipeline

    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False, **GREEDY)
    chain = PromptTemplate.from_template("Question: {question}\nAnswer:") | HuggingFacePipeline(pipeline=generate)
    return [chain.invoke({"question": QUESTIONS[1]}), "".join(chain.stream({"question": QUESTIONS[0]}))]


CLIENTS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "lm-eval": ("lm_eval", lm_eval),
    "pipeline": ("transformers", text_pipeline),
    "outlines": ("outlines", outlines),
    "peft": ("peft", peft),
    "langchain-huggingface": ("langchain-huggingface", langchain),
}


def main() -> None:
    """Do the work twice and print what came of it."""
    name, directory, share = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    distribution, work = CLIENTS[name]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    resident = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wanted = work(resident, tokenizer)
    del resident
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    options: dict[str, Any] = {"memory": int(share * weights), "dtype": "float32"}
    with headrace.load(directory, batch=2, prompt_tokens=64, max_tokens=128, **options) as model:
        got = work(model, tokenizer)
        plan = model.headrace.plan
        blocks = len(plan.placements)
        streamed = f"{blocks - plan.resident_blocks} of {blocks} blocks, in {share:.0%} of the weights' bytes"
    answer = {"equal": got == wanted, "version": importlib.metadata.version(distribution), "streamed": streamed}
    if not answer["equal"]:
        answer["why"] = f"{str(got)[:300]} instead of {str(wanted)[:300]}"
    elif name != "peft":
        answer["result"] = got
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
