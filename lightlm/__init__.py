"""LightLM: a toolkit for language models under 150M parameters.

    import lightlm

    model = lightlm.load("runs/demo")
    print(model.generate("Return a new"))

`load`, `prepare`, `train` and `evaluate` are loaded when they are first used, so `import lightlm` stays fast.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightlm.api import Model, Observer, Result, TextScore, evaluate, load, prepare, train

__version__ = "0.1.0"
__all__ = ["Model", "Observer", "Result", "TextScore", "evaluate", "load", "prepare", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lightlm.api"), name)
    raise AttributeError(f"module 'lightlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # for completion in a notebook


class _CallablePackage(ModuleType):
    """A package that is also the API function of its name: `lightlm.train(...)`, `lightlm.evaluate(...)`."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        function = getattr(importlib.import_module("lightlm.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **settings)


for _name in ("train", "evaluate"):
    importlib.import_module(f"lightlm.{_name}").__class__ = _CallablePackage
