"""What `lightlm generate` is asked to do: its options beside model and sampling, and which exclude each other.

Imports no torch, so mistakes are reported at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.cli.generate.guessing import Guessing
from lightlm.cli.generate.input import NO_CONVERSATION, checked, read_prompt, stop_text
from lightlm.errors import UsageError
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.settings import Settings

if TYPE_CHECKING:
    from lightlm.cli.generate.rows import Row


@dataclass(frozen=True, kw_only=True)
class Request:
    """The values of the options, as typed.

    Raises:
        UsageError: they do not name one source of prompts, or an option lacks another or excludes it.
    """

    prompt: str | None
    prompt_file: Path | None
    interactive: bool
    jsonl: Path | None
    out: Path | None
    batch_size: int | None
    chat: bool
    typed_system: str | None
    truncate: str | None
    sliding_window: bool
    stop: list[str]
    num_samples: int
    max_new_tokens: int
    logprobs: int | None
    beams: int | None
    length_penalty: float | None
    guessing: Guessing
    seed: int
    as_json: bool

    def __post_init__(self) -> None:
        self._check_source()
        self._check_out()
        if self.batch_size is not None and self.jsonl is None:
            raise UsageError("--batch-size is for the lines of a file; add --jsonl IN --out OUT")
        if self.guessing.count is not None and not self.guessing.lookup and self.guessing.draft is None:
            raise UsageError("--guesses says how many tokens --lookup or --draft guess; add one of them")
        if self.truncate not in (None, "left"):
            raise UsageError(
                f"--truncate {self.truncate}: write left, which drops the beginning of a prompt past the context"
            )
        if self.system is not None and not self.chat and self.jsonl is None:
            raise UsageError(NO_CONVERSATION)
        if self.interactive and (self.num_samples > 1 or self.as_json):
            raise UsageError("--interactive shows one answer at a time; leave out --num-samples and --json")
        if self.logprobs is not None and not (self.as_json and self.jsonl is None):
            raise UsageError("--logprobs needs --json, which prints them, and one prompt")

    @property
    def system(self) -> str | None:
        """The system's message, in UTF-8 whatever the locale."""
        return None if self.typed_system is None else checked(self.typed_system, "--system")

    def _check_source(self) -> None:
        """Raise UsageError unless one source of prompts is named."""
        given = {
            "a prompt": self.prompt is not None,
            "--prompt-file": self.prompt_file is not None,
            "--interactive": self.interactive,
            "--jsonl": self.jsonl is not None,
        }
        named = [name for name, there in given.items() if there]
        if not named:
            raise UsageError(
                'there is no prompt: write one (lightlm generate "Once"), `-` for standard input, --prompt-file FILE, '
                "--interactive, or --jsonl IN --out OUT"
            )
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} exclude each other; name one of them")

    def _check_out(self) -> None:
        """Raise UsageError unless --out goes with --jsonl and names a file that can be written."""
        source, out = self.jsonl, self.out
        if (source is None) != (out is None):
            raise UsageError(
                "--jsonl IN and --out OUT go together: prompts and answers. The text of one prompt goes to a file with "
                '> FILE: lightlm generate "Once" > samples.txt'
            )
        if out is not None and source is not None and out.exists() and source.exists() and out.samefile(source):
            raise UsageError(f"--out {out} is the file of prompts; name another file for the answers")
        if out is not None and (not out.parent.is_dir() or (out.exists() and not out.is_file())):
            problem = "is not a file" if out.exists() else f"cannot be written: there is no folder {out.parent}"
            raise UsageError(f"--out {out} {problem}; name a file in a folder that exists")

    def settings(self, sampling: Sampling) -> Settings:
        """Return how to answer each prompt.

        Raises:
            UsageError: beam search or guesses exclude other options, or a value is out of its range.
        """
        self._check_search(sampling)
        ends = tuple(stop_text(checked(text, "--stop")) for text in self.stop)
        return Settings(sampling, self.max_new_tokens, self.seed, ends, self.sliding_window)

    def _check_search(self, sampling: Sampling) -> None:
        """Raise UsageError for options of beam search and of guesses that exclude others."""
        if self.length_penalty is not None and self.beams is None:
            raise UsageError("--length-penalty compares beams; add --beams N")
        if self.beams is not None and sampling.filters != DEFAULT.filters:
            raise UsageError(
                "--beams draws nothing; leave out --temperature, --top-k, --top-p, --min-p and --typical-p"
            )
        if self.guessing.sources > 1:
            raise UsageError("--lookup, --draft and --mtp all guess the next tokens; choose one of them")
        if self.guessing.sources and (self.beams is not None or self.num_samples > 1 or self.jsonl is not None):
            raise UsageError(
                "--lookup, --draft and --mtp make one text faster; leave them out with --num-samples, --jsonl and "
                "--beams"
            )
        if self.beams is not None and (
            self.interactive
            or self.jsonl is not None
            or self.logprobs is not None
            or self.sliding_window
            or self.num_samples > self.beams
        ):
            raise UsageError(
                "--beams searches the continuations of one prompt, at least as many as --num-samples; leave out "
                "--interactive, --jsonl, --logprobs and --sliding-window"
            )

    def read_text(self) -> str | None:
        """Return the one prompt; None if there are several."""
        if self.interactive or self.jsonl is not None:
            return None
        return read_prompt(self.prompt, self.prompt_file)

    def read_rows(self, settings: Settings) -> "list[Row] | None":
        """Return the lines of --jsonl; None without it."""
        if self.jsonl is None:
            return None
        from lightlm.cli.generate.rows import read_rows

        return read_rows(self.jsonl, settings, chat=self.chat, system=self.system)

    def messages(self, text: str) -> list[dict[str, Any]] | None:
        """Return the conversation that the prompt is the last message of; None if it is a text to continue."""
        if not self.chat:
            return None
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": text}]
