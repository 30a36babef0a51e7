"""Tiny models of every family, made from a configuration, saved, and loaded through the real code."""

import copy
import gc
import io
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# threads that wait for each other must not keep a core from the other tests' processes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import tomli_w
import torch
import transformers
from hypothesis import settings as hypothesis_settings
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sentence_transformer.modules import Transformer as SentenceBody
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from crosslm.cli import main as cli
from crosslm.config import Config, LLMConfig
from crosslm.config_file import load
from crosslm.models.llm import LLM
from crosslm.models.tokens import load_tokenizer
from crosslm.preflight.starter import Start, draft, write_start
from crosslm.runs.finished import run
from crosslm.task import Task

# what the libraries have made stays, and is far more than the tests make: it would be looked through at each collection
gc.collect()
gc.freeze()
torch.set_num_threads(1)  # for models this small more threads are slower
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# a shared machine is slow at times, and the same examples every time make a failure one of the code
hypothesis_settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60)
hypothesis_settings.load_profile("ours")

pytest_plugins = ["of_federations", "of_uploads"]

PATIENCE = 600.0
"""Seconds to wait for another process: far more than it takes, since a shared machine is slow at times."""


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: those that test other processes mostly wait."""
    return (os.cpu_count() or 2) + 1


LONGEST = ("test_real.py", "test_federation_live.py", "test_crash.py", "test_attacks.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each process begins with one of the longest files, or the last of them would be waited for by all in the end."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    others = [item for item in items if item.path.name not in LONGEST]
    dealt: list[pytest.Item] = []
    for number in range(workers):  # as the even shares are cut that they begin with
        first = [item for name in LONGEST[number::workers] for item in items if item.path.name == name]
        share = (len(items) - len(dealt)) // (workers - number) - len(first)
        dealt += first + others[: max(share, 0)]
        others = others[max(share, 0) :]
    items[:] = dealt + others


GOOD = ["good", "lovely", "bright", "warm", "happy", "fine", "sweet", "kind"]
BAD = ["bad", "awful", "dull", "cold", "sad", "poor", "sour", "mean"]
TINY_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
"""Of a classifier of any type."""
THINGS = ["story", "film", "song", "meal", "room", "day", "walk", "book"]


def sentences(words: list[str], count: int = 40) -> list[str]:
    return [
        f"a {words[i % 8]} {THINGS[(i * 3 + i // 8) % 8]} and a {words[(i * 5 + 1) % 8]} one." for i in range(count)
    ]


CORPUS = [
    *sentences(GOOD),
    *sentences(BAD),
    "This is good.",
    "This is bad.",
    'Write a good text: "',
    'Write a bad text: "',
]


README_WORDS = ["This is routine or urgent, negative or positive."] * 5


def _bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *README_WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def _words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders gpt2, llama, gemma3 (LLMs), bert, distilbert (SLMs) and encoder."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bpe, words = _bpe(), _words()
    common = {"vocab_size": len(bpe), "bos_token_id": 0, "eos_token_id": 1}
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llms = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common)),
        "llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **wide, **common)),
        "gemma3": Gemma3ForCausalLM(
            Gemma3TextConfig(num_key_value_heads=1, head_dim=8, sliding_window=16, pad_token_id=1, **wide, **common)
        ),
    }
    for name, model in llms.items():
        model.save_pretrained(root / name)
        bpe.save_pretrained(root / name)
    small = {"vocab_size": len(words), "pad_token_id": 0, "max_position_embeddings": 64}
    slms = {
        "bert": BertForMaskedLM(BertConfig(**wide, **small)),
        "distilbert": DistilBertForMaskedLM(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **small)),
    }
    for name, model in slms.items():
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    body = SentenceBody(str(root / "bert"))
    SentenceTransformer(modules=[body, Pooling(32)], device="cpu").save(str(root / "encoder"))
    return root


TASK = {
    "labels": ["bad", "good"],
    "query": "{text} This is",
    "prompt": {"bad": 'Write a bad text: "', "good": ['Write a good text: "', 'A good text: "']},
    "statement": {"bad": "This is bad.", "good": "This is good."},
    "verbalizer": {"bad": "bad", "good": "good"},
}


def write_data(folder: Path) -> Path:
    """Rows of both labels, and a text without."""
    folder.mkdir()
    rows = [f'"{text}",{label}' for label, words in (("good", GOOD), ("bad", BAD)) for text in sentences(words)]
    rows = rows[::2] + rows[1::2]
    for name, part in (("train", rows[:60]), ("test", rows[60:])):
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(part) + "\n")
    (folder / "plain.txt").write_text("a good day and a bad day. " * 20)
    return folder


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def smallest(models: Path, data_folder: Path) -> dict:
    """A configuration, as TOML tables, of the smallest run that does everything."""
    fit = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "patience": 0}
    return {
        "name": "tiny",
        "device": "cpu",
        "task": copy.deepcopy(TASK),
        "data": {
            "dir": str(data_folder),
            "train": "train.csv",
            "test": "test.csv",
            "num_clients": 2,
            "alpha": 100.0,
            "judge_rows": 10,
        },
        "slm": {
            "models": [{"model": str(models / "bert")}, {"model": str(models / "distilbert")}],
            "max_length": 32,
            "private": fit,
            "synthetic": fit,
        },
        "llm": {"model": str(models / "gpt2"), "samples": 8, "batch_size": 4, "learning_rate": 1e-3, "lora_rank": 4},
        # models this small seldom end a text by themselves
        "synthesis": {"max_new_tokens": 12, "max_attempts": 100, "stop": ["e", "o"]},
        "selection": {"pool": 12, "fraction": 0.5, "encoder": str(models / "encoder")},
        "gate": {"enabled": False},  # models this small write nothing that a label could be read from
        "evaluation": {"nlu_rows": 10, "nlg_samples": 6, "perplexity_text": "plain.txt", "perplexity_tokens": 200},
    }


@pytest.fixture
def settings(models: Path, data_folder: Path) -> dict:
    return smallest(models, data_folder)


@pytest.fixture
def config(settings: dict) -> Config:
    return Config.model_validate(settings)


@pytest.fixture
def task(config: Config) -> Task:
    return Task.from_config(config.task)


def tiny_llm(models: Path, family: str, **changes: object) -> LLM:
    config = LLMConfig(model=family, **({"lora_rank": 4, "learning_rate": 1e-3} | changes))
    return LLM.load(str(models / family), config, seed=0)


TINY = {
    "gate.enabled": "false",
    "device": "cpu",
    "llm.samples": 4,
    "llm.batch_size": 4,
    "selection.pool": 6,
    "slm.max_length": 32,
    "slm.private": "{ epochs = 2, batch_size = 8, learning_rate = 1e-3 }",
    "slm.synthetic": "{ epochs = 1, batch_size = 8, learning_rate = 1e-3 }",
    "synthesis.max_new_tokens": 12,
    "synthesis.max_attempts": 100,
    "synthesis.stop": ["e", "o"],
    "evaluation.nlu_rows": 8,
    "evaluation.nlg_samples": 4,
}
TINY_AMOUNTS = tuple(f"{key}={value}" for key, value in TINY.items())


@pytest.fixture(scope="session")
def workplace(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tickets.toml, real rows for its silos, and a finished run of it in runs/tickets-1."""
    folder = tmp_path_factory.mktemp("workplace")
    start = Start(
        name="tickets",
        descriptions={"routine": "a request that can wait", "urgent": "a request that cannot wait"},
        clients=["north", "south"],
        kind="request",
        llm=str(models / "gemma3"),
        slm=str(models / "bert"),
        has_mean=False,
        encoder=str(models / "encoder"),
    )
    task = draft(start, load_tokenizer(start.llm, start.llm))
    for path in write_start(folder, start, task)[1:]:
        rows = [f'"{text}",{label}' for label, of in (("routine", GOOD), ("urgent", BAD)) for text in sentences(of, 12)]
        path.write_text("text,label\n" + "\n".join(rows) + "\n")
    # in float32, whatever this processor multiplies in: tests compare numbers closely
    config = load(folder / "tickets.toml", [*TINY_AMOUNTS, "llm.dtype=float32"])
    (folder / "tickets.toml").write_text(config.dump())
    run(config, folder / "runs" / "tickets-1", folder / "cache")
    return folder


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a command as a shell would, in a pipe; gives the exit code and both outputs."""

    def called(*arguments: object, stdin: str | bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["crosslm", *map(str, arguments)])
        given = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return called


@pytest.fixture
def command(shell, monkeypatch):
    """The same, with lines of 100 columns."""
    monkeypatch.setattr(cli.console, "width", 100)
    return shell


@pytest.fixture
def config_file(settings, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(settings))
    return path
