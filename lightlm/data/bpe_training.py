"""Training a byte-level BPE, in a process that can be stopped at any time.

The library's trainer does not return to Python for seconds, so neither Ctrl-C nor SIGTERM would end it, nor can a
thread that runs it be ended. So a child process (`python -m lightlm.data.bpe_training`) trains on a large sample. It is
killed when a signal ends the command.
"""

import contextlib
import itertools
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import IO

from lightlm.data.long_runs import cut_long_runs
from lightlm.errors import DataError
from lightlm.processes import python_command, python_environment

HERE_CHARACTERS = 200_000  # trained on in this process, which takes a second at most; starting another takes 0.3 s
_MODULE = __name__
_LENGTH = struct.Struct("<q")  # before each text on the child's standard input; _END is after the last
_END = -1


def train_bpe(texts: Iterable[str], vocab_size: int, end_of_text: str) -> bytes:
    """Return a tokenizer.json: byte-level BPE with GPT-2's pre-tokenizer, in which `end_of_text` has id 0.

    The same texts give the same bytes. Long runs of one kind of character are cut (`lightlm.data.long_runs`).
    """
    rest = iter(cut_long_runs(texts))
    beginning: list[str] = []
    characters = 0
    for text in rest:
        beginning.append(text)
        characters += len(text)
        if characters > HERE_CHARACTERS:
            return _train_in_child(itertools.chain(beginning, rest), vocab_size, end_of_text)
    return _train(beginning, vocab_size, end_of_text)


def _train(texts: Iterable[str], vocab_size: int, end_of_text: str) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    definition = Tokenizer(models.BPE())
    definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    definition.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    definition.train_from_iterator(texts, trainer)
    return definition.to_str(pretty=True).encode()


def _train_in_child(texts: Iterable[str], vocab_size: int, end_of_text: str) -> bytes:
    command = python_command("-m", _MODULE, str(vocab_size), end_of_text)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=python_environment(), stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdin is not None
        try:
            return _result(child, child.stdin, texts)
        finally:
            child.kill()
            with contextlib.suppress(OSError):
                child.stdin.close()


def _result(child: subprocess.Popen[bytes], pipe: IO[bytes], texts: Iterable[str]) -> bytes:
    """Send the texts to the child, and return what it prints. Raises DataError where it fails."""
    try:
        for text in texts:
            data = text.encode()
            pipe.write(_LENGTH.pack(len(data)) + data)
        pipe.write(_LENGTH.pack(_END))
    except BrokenPipeError:
        pass  # the child has failed, and says why
    while True:
        try:
            printed, message = child.communicate(timeout=0.2)  # without a limit, Windows would not handle Ctrl-C
        except subprocess.TimeoutExpired:
            continue
        if child.returncode:
            reason = message.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
            raise DataError(
                f"Training the tokenizer failed: {reason[-1]}. Free memory, or use an existing one: --tokenizer gpt2"
            )
        return printed


def _sent_texts(pipe: IO[bytes]) -> Iterator[str]:
    while (length := _LENGTH.unpack(pipe.read(_LENGTH.size))[0]) != _END:  # fails if the parent is gone
        yield pipe.read(length).decode()


if __name__ == "__main__":
    sys.stdout.buffer.write(_train(_sent_texts(sys.stdin.buffer), int(sys.argv[1]), sys.argv[2]))
