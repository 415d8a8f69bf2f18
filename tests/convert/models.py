"""Models of LightLM and of transformers to convert, and the difference between two of them."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from lightlm.checkpoint import LoadedModel
from lightlm.model.transformer import Transformer


@torch.no_grad()
def roughen(model):
    """Weights, and the selection biases of routers, far from their first values."""
    for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "bias" in name)):
        tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def loaded(config, tokenizer, path="model"):
    torch.manual_seed(0)
    model = Transformer(replace(config, vocab_size=config.vocab_size or tokenizer.vocab_size))
    return LoadedModel(roughen(model), tokenizer, Path(path))


def write(model, tokenizer, path, **options):
    """A folder as transformers writes it, with a tokenizer."""
    model.save_pretrained(path, **options)
    tokenizer.save(path / "tokenizer.json")
    return path


def edit(path, **changes):
    """Change the keys of a JSON file; "DELETED" removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "DELETED"}))


@torch.no_grad()
def difference(model, theirs):
    """The largest difference of logits between our model and one of transformers'."""
    length = min(40, model.config.max_seq_len)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    return (model(tokens) - theirs(tokens).logits).abs().max().item()
