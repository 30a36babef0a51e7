"""What the LLM wrote, read and learned, kept on disk and not done twice (``--llm-cache``).

Two runs that differ only in what their SLMs learn (step 5), or in their test rows, have the same LLM from beginning to
end, which is nearly all of their time; two that differ in ``llm.interpolation`` have it until then. Everything here
follows from weights, arguments and the code. A file is named by the SHA-256 of the former two and the versions of
crosslm and its libraries, so that whatever differs is done; who changes how crosslm itself writes, reads or learns must
begin a new folder.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslm.config import SynthesisConfig
from crosslm.errors import RunError
from crosslm.models.llm import LLM
from crosslm.records import SyntheticSet
from crosslm.runs import snapshot
from crosslm.server import Server
from crosslm.support.files import alone, write_whole
from crosslm.support.provenance import versions

LOCK = ".lock"


class LLMCache:
    """A folder of results, and how many were found in it and made; it is made if it is not there.

    Raises:
        RunError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.made = folder, 0, 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # its rewards are of classifiers of private text
            (folder / LOCK).touch()
        except OSError as error:
            raise self._cannot_be_written(error) from error

    def get(self, key: str) -> Any:
        """A result; None if it has not been kept.

        Raises:
            RunError: it is damaged.
        """
        path = self.folder / f"{key}.json"
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged, delete it to have it done again: {error}") from error
        self.found += 1
        return kept

    def put(self, key: str, result: Any, **data: bytes) -> None:
        """Keep a result, and bytes that belong to it.

        Raises:
            RunError: the folder cannot be written.
        """
        try:
            with alone(self.folder / LOCK, wait=True):  # other cells may make the same at the same time
                for ending, content in data.items():
                    write_whole(self.folder / f"{key}.{ending}", [content])
                write_whole(self.folder / f"{key}.json", [json.dumps(result).encode()])  # last: now it is there
        except OSError as error:
            raise self._cannot_be_written(error) from error
        self.made += 1

    def _cannot_be_written(self, error: OSError) -> RunError:
        return RunError(f"{self.folder}: cannot be written: {error}; choose another --llm-cache")

    def data(self, key: str, ending: str) -> bytes:
        """Bytes that belong to a result.

        Raises:
            RunError: they are not there.
        """
        try:
            return (self.folder / f"{key}.{ending}").read_bytes()
        except OSError as error:
            raise RunError(f"{self.folder}: damaged, delete {key}.json to have it done again: {error}") from error


class CachedLLM(LLM):
    """An LLM that does not write or read twice what it wrote or read with these weights."""

    cache: LLMCache
    _original = ""

    def key(self, what: str, **arguments: Any) -> str:
        """SHA-256 of all that a result follows from: what is frozen, what is trained, and the arguments."""
        if not self._original:
            self._original = self._frozen_digest()
        everything = [self._original, self.fingerprint(), what, arguments]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
        sampling: SynthesisConfig,
        on_step: Callable[[int], None] = lambda _: None,
        original: bool = False,
    ) -> list[list[int]]:
        """As :meth:`LLM.generate`; of what is known ``on_step`` is told all the same, since it counts tokens."""
        arguments = {"prompts": prompts, "seeds": seeds, "sampling": sampling.model_dump(mode="json")}
        key = self.key("generate of the original" if original else "generate", **arguments)
        kept = self.cache.get(key)
        if kept is None:
            steps: list[int] = []

            def step(tokens: int) -> None:
                steps.append(tokens)
                on_step(tokens)

            written = super().generate(prompts, seeds, sampling, step, original)
            self.cache.put(key, {"written": written, "steps": steps})
            return written
        for tokens in kept["steps"]:
            on_step(tokens)
        found: list[list[int]] = kept["written"]
        return found

    def classify(self, queries: Sequence[str], verbalizer_ids: Sequence[Sequence[int]]) -> Tensor:
        """As :meth:`LLM.classify`."""
        key = self.key("classify", queries=queries, verbalizer_ids=verbalizer_ids)
        kept = self.cache.get(key)
        if kept is None:
            kept = super().classify(queries, verbalizer_ids).tolist()
            self.cache.put(key, kept)
        return torch.tensor(kept)

    def perplexity(self, text: str, max_tokens: int, advance: Callable[[float], None] = lambda _: None) -> float:
        """As :meth:`LLM.perplexity`."""
        key = self.key("perplexity", text=text, max_tokens=max_tokens)
        kept = self.cache.get(key)
        if kept is None:
            kept = super().perplexity(text, max_tokens, advance)
            self.cache.put(key, kept)
        return float(kept)

    def _frozen_digest(self) -> str:
        """Of all else that a result depends on: frozen weights, tokenizer, adapter's scale, device, libraries."""
        about = [self.config.lora_alpha, self.config.lora_rank, str(self.device), versions()]
        about += [self.model.config.to_json_string(), sorted(end for end in self.end_ids if end is not None)]
        digest = hashlib.sha256(json.dumps([*about, self.tokenizer.get_vocab()], sort_keys=True).encode())
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class CachedServer(Server):
    """A server whose LLM does not learn twice what it learned with these weights from these texts and rewards."""

    llm: CachedLLM

    def update_llm(self, drafts: SyntheticSet, rewards: Tensor, seed: int, who: str = "") -> list[dict[str, float]]:
        """As :meth:`Server.update_llm`."""
        moments = hashlib.sha256(snapshot.optimizer_bytes(self)).hexdigest()
        # llm.interpolation comes when all is learned
        arguments = {
            "drafts": snapshot.texts_bytes(drafts).decode(),
            "rewards": rewards.tolist(),
            "seed": seed,
            "statements": self.task.statements,
            "config": self.config.llm.model_dump(mode="json", exclude={"interpolation"}),
        }
        key, cache = self.llm.key("update", optimizer=moments, **arguments), self.llm.cache
        kept: list[dict[str, float]] | None = cache.get(key)
        if kept is None:
            kept = super().update_llm(drafts, rewards, seed, who)
            adapter, optimizer = snapshot.adapter_bytes(self), snapshot.optimizer_bytes(self)
            cache.put(key, kept, adapter=adapter, optimizer=optimizer)
            return kept
        adapter, optimizer = cache.data(key, "adapter"), cache.data(key, "optimizer")
        snapshot.restore_server(self, adapter, optimizer, self.steps, self.taught)
        return kept
