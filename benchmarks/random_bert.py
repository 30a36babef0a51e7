"""A BERT of a given size with random weights, for benchmarks of what carries it."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

SHAPES = ((200.0, 768, 30522), (20.0, 384, 30522), (1.0, 128, 1000), (0.0, 32, 200))
"""From so many megabytes: width and vocabulary; of the widths, 768 is BERT-base's and 384 MiniLM's."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def random_bert(folder: Path, megabytes: float) -> None:
    """Write a model folder of about this size: as many layers as fit, at least one."""
    width, words = next((width, words) for least, width, words in SHAPES if megabytes >= least)
    layers = max(1, round((megabytes * 1e6 / 4 - words * width) / (12 * width**2)))
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    word_tokenizer(folder, words)


def word_tokenizer(folder: Path, words: int, **more: str) -> None:
    """Write a tokenizer of so many made-up words; ``more``: roles that special tokens have too."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(words - len(SPECIAL)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | more).save_pretrained(folder)
