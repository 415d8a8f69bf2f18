"""`lightlm serve`: answer requests of OpenAI's clients, and show a page to try a model."""

from importlib.util import find_spec
from typing import Annotated

import typer

from lightlm.cli.console import console
from lightlm.cli.generate.model import (
    MODEL_HELP,
    DeviceOption,
    DtypeOption,
    ModelChoice,
    QuantizeOption,
    WeightsOption,
)
from lightlm.errors import LightLMError, UsageError, how_to_install


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=MODEL_HELP,
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; one that others can reach needs --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LIGHTLM_API_KEY",
            metavar="KEY",
            help="Key that requests must send; safer in the environment variable.",
            show_default=False,
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Site whose pages may use the server, such as https://example.org; repeatable, * for all.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of answers decoded at a time.")] = 8,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Maximum number of answers that wait for a place in the batch.")
    ] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until an unfinished answer ends with an error.")] = 600,
    weights: WeightsOption = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page to try it. Ctrl-C ends it."""
    from lightlm.serve.access import Access
    from lightlm.train.signals import stop_on_signals

    choice = ModelChoice(model, weights, dtype, quantize, device)
    access = Access(api_key, tuple(cors or ()))
    access.check_host(host)
    if missing := [package for package in ("starlette", "uvicorn") if find_spec(package) is None]:
        raise UsageError(f"lightlm serve needs {' and '.join(missing)}; {how_to_install('serve')}")
    choice.check_files()
    # All that needs no torch is checked by now: importing it takes a second or two.
    from lightlm.serve.app import Service
    from lightlm.serve.loop import Limits
    from lightlm.serve.server import GRACE_SECONDS, listen, serving, url_of

    listening = listen(host, port)
    loaded = choice.load(lambda message: console.print(f"Note: {message}", markup=False))
    service = Service(loaded, Limits(batch_size, max_queue, timeout), access, model)
    with stop_on_signals() as stop, serving(service, listening) as running:
        url = url_of(listening)
        message = f"{loaded.name} answers at {url} (page) and {url}/v1 (OpenAI's API). Ctrl-C ends it."
        console.print(message, markup=False, soft_wrap=True)
        while not stop.wait(0.2):  # on Windows, waiting without end would not notice Ctrl-C
            if not running():
                raise LightLMError("the server ended unexpectedly; see the messages above")
        if service.loop.busy:
            message = f"Answers that have begun have {GRACE_SECONDS:g} s to finish; Ctrl-C again ends them at once."
            console.print(message, soft_wrap=True)
