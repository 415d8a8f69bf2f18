"""The Modelfile that Ollama reads beside a GGUF file: `ollama create NAME -f NAME.Modelfile`."""

from pathlib import Path

from lightlm.checkpoint import LoadedModel


def modelfile(loaded: LoadedModel, out: Path) -> str:
    """Return the Modelfile of a GGUF file in the same folder.

    Without a chat template the prompt is continued as it is. Ollama's own context is 4,096 positions, which may be more
    than the model has.
    """
    end = loaded.tokenizer.end_of_text.replace('"', '\\"')
    return "\n".join(
        (
            f"# ollama create {loaded.name.replace('/', '-')} -f {out.with_suffix('.Modelfile').name}",
            f"FROM ./{out.name}",
            'TEMPLATE "{{ .Prompt }}"',
            f"PARAMETER num_ctx {loaded.model.config.max_seq_len}",
            f'PARAMETER stop "{end}"',
            "",
        )
    )
