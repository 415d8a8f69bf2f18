"""`lightlm generate -i`: prompts or turns of a conversation, one after the other."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from lightlm.checkpoint import LoadedModel
from lightlm.cli.console import console
from lightlm.cli.generate.input import BLOCK, Entries, remembered, stop_text
from lightlm.cli.generate.single import answer, speed, write
from lightlm.data.chat.template import ChatTemplate
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.prompts import PromptReader
from lightlm.generate.settings import Settings, changeable
from lightlm.generate.speculation import Speculation
from lightlm.generate.text_batch import Answer, Question
from lightlm.names import nearest

_HELP = f"""\
Type a text and Enter. A backslash at the end of a line continues it; {BLOCK} begins and ends a text of several lines.
  /temperature 0.7  change a setting; without a value, show it. All: {{settings}}
  /settings         show all settings
  /system TEXT      set the system's message of the conversation, and begin anew
  /again            answer the last text once more, with the next seed
  /reset            forget the conversation
  /help, /exit      show this, end
A text that begins with / is written with //. Ctrl-C stops an answer, Ctrl-D ends."""


@dataclass
class Session:
    """What is said, and how to answer.

    Args:
        chat: keep the turns of a conversation and write them with the model's chat template; else each text is
            continued by itself.
        system: the conversation's system message.
        speculation: guesses tokens; None guesses none.

    Raises:
        UsageError: a conversation with a model that has no chat template.
        LightLMError: its template is faulty.
    """

    loaded: LoadedModel
    reader: PromptReader
    settings: Settings
    chat: bool
    system: str | None = None
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._last: str | None = None
        if self.chat:
            ChatTemplate.of(self.loaded.tokenizer)  # or it raises
        elif "chat_template" in self.loaded.tokenizer.settings:
            _say(
                "This model has a chat template. Each text is continued as it is; start with --chat for a conversation."
            )

    def run(self) -> None:
        """Answer entries until the input ends."""
        entries = Entries()
        if entries.terminal:
            console.print("[dim]/help shows what you can do. Ctrl-D ends.[/]")
        with remembered() if entries.terminal else contextlib.nullcontext():
            while True:
                try:
                    if not self._take(entries.next()):
                        return
                except EOFError:
                    if entries.terminal:
                        write("\n")
                    return
                except KeyboardInterrupt:
                    if not entries.terminal:
                        raise
                    console.print("\n[dim]Ctrl-D ends.[/]")
                except LightLMError as error:
                    _say(str(error))

    def _take(self, entry: str) -> bool:
        """Do what an entry asks; return False if that is to end."""
        if not entry.strip():
            return True
        if not entry.startswith("/") or entry.startswith("//"):
            self._answer(entry[1:] if entry.startswith("//") else entry)
            return True
        name, _, value = entry[1:].partition(" ")
        name, value = name.strip(), value.strip()
        if name in ("exit", "quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _say(_HELP.format(settings=", ".join(f"/{_dashed(each)}" for each in changeable()))),
            "settings": lambda _: _say("\n".join(f"{_dashed(each)} {self._shown(each)}" for each in changeable())),
            "reset": self._reset,
            "system": self._set_system,
            "again": self._again,
        }
        setting = name.replace("-", "_")
        if name in commands:
            commands[name](value)
        elif setting in changeable():
            if value:
                self.settings = self.settings.changed({setting: _parsed(setting, value)})
            _say(f"{_dashed(setting)} {self._shown(setting)}")
        else:
            known = nearest(name, [*commands, *map(_dashed, changeable())])
            hint = f"; do you mean /{known}?" if known else "."
            raise UsageError(f"there is no command /{name}{hint} /help lists all; // begins a text with a slash")
        return True

    def _answer(self, text: str) -> None:
        """Answer a text. If that fails, or is stopped before anything is said, the conversation stays as it was."""
        most = self.settings.max_new_tokens
        said = [*self._turns, {"role": "user", "content": text}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = self.reader.read_chat(system + said, most) if self.chat else self.reader.read(text, most)
        self._last = text
        if self.speculation is not None:
            self.speculation.take_counts()  # those of an answer that was stopped
        shown: list[str] = []
        started = time.perf_counter()

        def show(piece: str) -> None:
            shown.append(piece)
            write(piece)

        whole: Answer | None = None
        with contextlib.suppress(KeyboardInterrupt):
            [whole] = answer(self.loaded, [Question(ids, self.settings)], show, self.speculation)
        seconds = time.perf_counter() - started
        write("\n")
        if self.chat and (whole is not None or "".join(shown)):
            self._turns = [*said, {"role": "assistant", "content": "".join(shown)}]
        if whole is None:
            _say("stopped")
            return
        context = f"the context of {self.reader.max_seq_len:,} tokens is full"
        endings = {
            "length": f"; ended after max-new-tokens {most:,}",
            "context": f"; {context}: /sliding-window true goes past it",
        }
        _say(speed(len(whole.ids), seconds, self.speculation) + endings.get(whole.finish_reason, ""))

    def _again(self, _: str) -> None:
        if self._last is None:
            raise UsageError("there is nothing to answer again")
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        before = self._turns
        if before and before[-2]["content"] == self._last:
            self._turns = before[:-2]
        try:
            self._answer(self._last)
        finally:
            if before and self._turns == before[:-2]:  # nothing was said
                self._turns = before

    def _reset(self, _: str) -> None:
        self._turns, self._last = [], None

    def _set_system(self, text: str) -> None:
        if not self.chat:
            raise UsageError("/system is for a conversation: start with --chat")
        self.system = text or None
        self._reset("")

    def _shown(self, setting: str) -> str:
        """Return a setting's value as it is typed."""
        value = getattr(self.settings, setting, None)
        value = getattr(self.settings.sampling, setting) if value is None else value
        value = dict(value) if setting == "logit_bias" else value
        return "none" if value is None or value in ((), {}) else json.dumps(value, ensure_ascii=False)


def _dashed(setting: str) -> str:
    return setting.replace("_", "-")


def _parsed(setting: str, text: str) -> Any:
    """Return the value that was typed: JSON, `none`, or a text."""
    if text.lower() == "none":
        return {"stop": [], "logit_bias": {}}.get(setting)
    try:
        value = json.loads(text)
    except ValueError:
        return stop_text(text) if setting == "stop" else text
    return text if setting == "stop" and not isinstance(value, str | list) else value  # such as the text 5


def _say(text: str) -> None:
    console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)
