"""Ask a chat model the held-out questions of the source `skills`: exact answers per skill, and answers that stop.

    python benchmarks/chat_demo.py runs/chat-demo
    python benchmarks/chat_demo.py runs/chat-demo/hf --program transformers
    python benchmarks/chat_demo.py chat-demo.gguf --program llama.cpp      # needs llama-cpp-python

Each question is a conversation of its own, answered with the likeliest tokens.
"""

import argparse
import json
from collections.abc import Callable

from lightlm.data.sources.skills import SKILLS, held_out

MOST_TOKENS = 32  # an answer has 13 tokens at most
Ask = Callable[[str], tuple[str, bool]]  # a question to its answer and whether the model ended it


def with_lightlm(path: str) -> Ask:
    from lightlm.convert.load import load_pretrained
    from lightlm.generate.engine import generate
    from lightlm.generate.prompts import encode_chat
    from lightlm.generate.sampling import Sampling
    from lightlm.generate.text import text_of

    loaded = load_pretrained(path)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer

    def ask(question: str) -> tuple[str, bool]:
        ids = encode_chat(tokenizer, [{"role": "user", "content": question}])[1]
        [answer] = generate(model, [ids], MOST_TOKENS, Sampling(temperature=0), 0, tokenizer.end_ids)
        return text_of(tokenizer, ids, answer.ids), answer.finish_reason == "stop"

    return ask


def with_transformers(path: str) -> Ask:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)

    def ask(question: str) -> tuple[str, bool]:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False)[0, given["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        stopped = int(out[-1]) in (ends if isinstance(ends, list) else [ends])
        return tokenizer.decode(out, skip_special_tokens=True), stopped

    return ask


def with_llama_cpp(path: str) -> Ask:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=128, verbose=False)

    def ask(question: str) -> tuple[str, bool]:
        answer = model.create_chat_completion(
            [{"role": "user", "content": question}], max_tokens=MOST_TOKENS, temperature=0
        )
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"] == "stop"

    return ask


PROGRAMS = {"lightlm": with_lightlm, "transformers": with_transformers, "llama.cpp": with_llama_cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--program", choices=PROGRAMS, default="lightlm")
    parser.add_argument("--questions", type=int, default=40, help="held-out questions per skill")
    options = parser.parse_args()
    ask = PROGRAMS[options.program](options.model)
    found = {}
    for skill in SKILLS:
        questions = held_out(skill, options.questions)
        answers = [ask(question) for question, _ in questions]
        right = sum(text.strip() == answer for (text, _), (_, answer) in zip(answers, questions, strict=True))
        found[skill] = {"exact": right / len(questions), "stopped": sum(end for _, end in answers) / len(questions)}
        print(f"{skill:<8}  exact {found[skill]['exact']:4.0%}  stopped {found[skill]['stopped']:4.0%}", flush=True)
    print(json.dumps({"model": options.model, "program": options.program, "skills": found}))


if __name__ == "__main__":
    main()
