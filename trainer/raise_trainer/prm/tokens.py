"""`raise-core prm tokens`: a copy of a model whose tokenizer has the chain's tokens."""

from pathlib import Path

from ..chain_tokens import ChainTokens, add_chain_tokens
from ..errors import UserError
from ..models import read_model
from ..prompts import load_processor


def save_with_tokens(model: str, folder: Path) -> ChainTokens:
    """Load, add the tokens, save model and processor in the dtype they had. UserError for a folder in use."""
    import transformers

    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files already; name another folder")
    processor, _ = load_processor(model)
    tokenizer = getattr(processor, "tokenizer", None)
    kind = (
        transformers.AutoModelForCausalLM if tokenizer is None else transformers.AutoModelForImageTextToText
    )
    loaded = read_model(kind, model, {"dtype": "auto"})
    made = add_chain_tokens(loaded, processor if tokenizer is None else tokenizer)
    loaded.save_pretrained(folder)
    processor.save_pretrained(folder)
    return made
