"""Ask a chat model the held-out questions of the source `skills`: exact answers per skill, and answers that stop.

    python benchmarks/chat_demo.py runs/chat-demo [--questions 100] [--out FILE]

The model is asked in LightLM, in transformers after `convert --to huggingface`, and in llama.cpp after `convert --to
gguf`; the last with the template in the file, through the server's chat endpoint. The same model untrained shows what
training gave. Each question is a conversation of its own, answered with the likeliest tokens. It needs
the extra `[gguf]`.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import make_parser, write_json

from lightlm.checkpoint import LoadedModel
from lightlm.convert.gguf.file import export_gguf
from lightlm.convert.gguf.llamacpp import llama_cpp
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.convert.load import load_pretrained
from lightlm.data.sources.skills import SKILLS, held_out
from lightlm.generate.engine import generate
from lightlm.generate.prompts import encode_chat
from lightlm.generate.sampling import Sampling
from lightlm.generate.text import text_of
from lightlm.model.transformer import Transformer

MOST_TOKENS = 64  # the longest answer has 20 words
Ask = Callable[[str], tuple[str, bool]]  # a question to its answer and whether the model ended it


@contextlib.contextmanager
def in_lightlm(loaded: LoadedModel) -> Iterator[Ask]:
    model, tokenizer = loaded.model.eval(), loaded.tokenizer

    def ask(question: str) -> tuple[str, bool]:
        ids = encode_chat(tokenizer, [{"role": "user", "content": question}])[1]
        [answer] = generate(model, [ids], MOST_TOKENS, Sampling(temperature=0), 0, tokenizer.end_ids)
        return text_of(tokenizer, ids, answer.ids), answer.finish_reason == "stop"

    yield ask


@contextlib.contextmanager
def untrained(loaded: LoadedModel) -> Iterator[Ask]:
    torch.manual_seed(0)
    with in_lightlm(replace(loaded, model=Transformer(loaded.model.config))) as ask:
        yield ask


@contextlib.contextmanager
def in_transformers(loaded: LoadedModel) -> Iterator[Ask]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(loaded, Path(folder) / "hf")
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/hf")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/hf")

    def ask(question: str) -> tuple[str, bool]:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False)[0, given["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        stopped = int(out[-1]) in (ends if isinstance(ends, list) else [ends])
        return tokenizer.decode(out, skip_special_tokens=True), stopped

    yield ask


@contextlib.contextmanager
def in_llama_cpp(loaded: LoadedModel) -> Iterator[Ask]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(loaded, path, "float32")
        with llama_cpp(path, positions=loaded.model.config.max_seq_len) as server:

            def ask(question: str) -> tuple[str, bool]:
                request = {"messages": [{"role": "user", "content": question}], "max_tokens": MOST_TOKENS}
                [choice] = server.ask("/v1/chat/completions", request | {"temperature": 0.0})["choices"]
                return choice["message"]["content"] or "", choice["finish_reason"] == "stop"

            yield ask


PLACES = {
    "untrained": untrained, "lightlm": in_lightlm, "transformers": in_transformers, "llama.cpp": in_llama_cpp,
}  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions per skill")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    loaded = load_pretrained(options.model)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for place in options.places:
        results[place] = {}
        with PLACES[place](loaded) as ask:
            for skill in SKILLS:
                questions = held_out(skill, options.questions)
                answers = [ask(question) for question, _ in questions]
                exact = sum(text.strip() == right for (text, _), (_, right) in zip(answers, questions, strict=True))
                shares = {"exact": exact / len(questions), "stopped": sum(end for _, end in answers) / len(questions)}
                results[place][skill] = {"questions": len(questions), **shares}
                print(
                    f"{place:<13} {skill:<10} exact {shares['exact']:4.0%}  stopped {shares['stopped']:4.0%}",
                    flush=True,
                )
    write_json({"model": options.model, "places": results}, options.out)


if __name__ == "__main__":
    sys.exit(main())
