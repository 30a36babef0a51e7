"""The server's language model: writes text, scores text, classifies text, and can be trained.

``reference`` is theta_old, the original model: with LoRA the adapter switched off, with full
fine-tuning a frozen copy. Dropout is off throughout, so that before the first update the
log-ratio of Eq. 5 and the divergence of Eq. 8 are exactly 0.
"""

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crosslm.algorithm.verbalizer import label_probabilities
from crosslm.config import LLMConfig, SynthesisConfig
from crosslm.errors import ModelError
from crosslm.models.adapter_weights import interpolated, merged
from crosslm.models.causal import check_head, head_weight, load_causal, lora_config
from crosslm.models.decoding import decode
from crosslm.models.graph_decoding import can_be_recorded, decode_recorded
from crosslm.models.head import head_logps, head_scores
from crosslm.models.lower_layers import UpperLayers
from crosslm.models.tokens import TextEnd, distinct_tokens, encode

SCORING_BATCH = 16
"""Texts that Eq. 1 is read of at once: more of them are padded more, which two cores do not make up for."""
PERPLEXITY_WINDOW = 256

NOT_ITS_OWN = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Of an LLM's configuration what says how and by what it was loaded."""
CALLS_SET = ("padding", "truncation")
"""Of a tokenizer what a call leaves behind."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of each token of a batch of sequences, given the tokens before it.

    All ``(batch, tokens - 1)``; the column j belongs to token j + 1, since the first token
    (beginning of sequence) is given. Zero where ``mask`` is false.
    """

    logps: Tensor
    reference_logps: Tensor
    kl: Tensor
    mask: Tensor
    """True at every token but padding."""


class LLM:
    """A causal language model with its tokenizer and, for ``adapter = "lora"``, its adapter."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: LLMConfig, original: Any = None) -> None:
        """Wrap a loaded model; ``original`` is theta_old of full fine-tuning, by default a copy of the model."""
        self.tokenizer = tokenizer
        self.config = config
        self.model = model
        self._frozen: Any = None
        check_head(model)
        if config.adapter == "full":
            self._frozen = (copy.deepcopy(model) if original is None else original).eval().requires_grad_(False)
        elif not isinstance(model, PeftModel):
            self.model = get_peft_model(model, lora_config(model, config))
        self.model.eval()

    @classmethod
    def load(cls, folder: str, config: LLMConfig, seed: int, device: str = "cpu") -> Self:
        """Load a model folder or hub id, with a new adapter whose first values come from the seed.

        Raises:
            ModelError: it cannot be loaded, or its head is not a plain matrix.
        """
        model, tokenizer = load_causal(folder, config, device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(model, tokenizer, config)

    @classmethod
    def load_trained(cls, folder: str, trained: str, config: LLMConfig, device: str = "cpu") -> "LLM":
        """Load what :meth:`save` wrote to ``trained``; ``folder`` is the original model."""
        if config.adapter == "full":
            original, tokenizer = load_causal(folder, config, device)
            model, trained_tokenizer = load_causal(trained, config, device)
            if tokenizer.get_vocab() != trained_tokenizer.get_vocab():
                raise ModelError(f"{trained}: has another vocabulary than {folder}; have llm.vocabulary_texts changed?")
            return cls(model, tokenizer, config, original)
        model, tokenizer = load_causal(folder, config, device)
        try:
            adapted = PeftModel.from_pretrained(model, trained, is_trainable=True)
        except Exception as error:  # as of a folder that is no model (models/loading.py)
            raise ModelError(f"{trained}: the adapter cannot be loaded: {error}\nRun its config.toml again.") from error
        return cls(adapted, tokenizer, config)

    def save(self, folder: str) -> None:
        """Write the adapter (or, after full fine-tuning, the model) and the tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def end_ids(self) -> set[int | None]:
        """Tokens that end a text."""
        eos = self.model.generation_config.eos_token_id
        return {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id}

    @property
    def positions(self) -> int:
        """Tokens that it reads at most, as far as its configuration says it."""
        return int(getattr(self._causal().config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._head().device

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """What an optimiser may change: the adapter, or everything."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def fingerprint(self) -> str:
        """SHA-256 of the trainable parameters: tells whether an update changed anything."""
        digest = hashlib.sha256()
        for parameter in self.trainable_parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def original_digest(self) -> str:
        """SHA-256 of the original LLM: tokenizer, architecture, and weights in bfloat16, whatever they are held in."""
        ends = sorted(end for end in self.end_ids if end is not None)
        architecture = {name: value for name, value in self.model.config.to_dict().items() if name not in NOT_ITS_OWN}
        known: Any = sorted(self.tokenizer.get_vocab().items())
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):  # one in Python alone has none
            known = [value for name, value in sorted(json.loads(backend.to_str()).items()) if name not in CALLS_SET]
        about = [known, ends, architecture]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        frozen = self._frozen.parameters() if self._frozen is not None else self.model.parameters()
        for parameter in frozen:
            if not parameter.requires_grad:
                digest.update(parameter.detach().bfloat16().cpu().contiguous().view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()}"

    # -- text and tokens ---------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, after the beginning-of-sequence token where the model has one."""
        return encode(self.tokenizer, text)

    # -- step 3 ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
        sampling: SynthesisConfig,
        on_step: Callable[[int], None] = lambda _: None,
        original: bool = False,
    ) -> list[list[int]]:
        """Sample ``x ~ P(.|M(y))`` (Eq. 3) for each prompt, given as tokens, with a seed of its own.

        With ``original`` the LLM writes as it was before any update.

        Returns:
            The sampled tokens of each text, with the token that ended it: the end-of-sequence
            token or the one that completed a stop string.
        """
        has_ended = TextEnd(self.tokenizer, self.end_ids, sampling.stop)
        with self._reference() if original else merged(self.model, self.device) as model:
            longest = max(map(len, prompts)) + sampling.max_new_tokens
            how = decode_recorded if can_be_recorded(model.config, self.device, longest) else decode
            head = head_weight(model)
            return how(model.base_model, head, model.config, prompts, seeds, sampling, has_ended, on_step)

    # -- step 4 ------------------------------------------------------------------------------

    def score(self, sequences: Sequence[Sequence[int]]) -> TokenScores:
        """Log-probabilities under this model and the reference, and the KL divergence (Eq. 5, 6, 8)."""
        ids, attention = self._pad(sequences)
        mask = attention[:, 1:].bool()
        upper = UpperLayers(self._causal())
        with upper.remembered():
            hidden = self._hidden(self._causal().base_model, ids, attention)[mask]
        with torch.no_grad(), self._reference() as reference:
            shared = upper.again()[:, :-1] if upper.below else self._hidden(reference.base_model, ids, attention)
            reference_hidden, reference_head = shared[mask], head_weight(reference)
        places, which = (
            torch.tensor(numbers, dtype=torch.long, device=self.device) for numbers in distinct_tokens(sequences)
        )
        targets = ids[:, 1:][mask][places]
        flat = head_scores(hidden[places], self._head(), targets, reference_hidden[places], reference_head)
        logps, reference_logps, kl = (_unflatten(values[which], mask) for values in flat)
        return TokenScores(logps, reference_logps, kl, mask)

    def logps(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Log-probability of each token given those before it (Eq. 6, 7), and the mask of tokens.

        Returns:
            Both ``(batch, tokens - 1)``, as in :class:`TokenScores`.
        """
        ids, attention = self._pad(sequences)
        mask = attention[:, 1:].bool()
        hidden = self._hidden(self._causal().base_model, ids, attention)[mask]
        return _unflatten(head_logps(hidden, self._head(), ids[:, 1:][mask]), mask), mask

    # -- when it has learned -----------------------------------------------------------------

    @contextmanager
    def interpolated(self, share: float) -> Iterator[None]:
        """Within it the weights lie between theta_old and theta: ``theta_old + share * (theta - theta_old)``.

        Afterwards they are theta again.

        Args:
            share: of the weights as trained, in [0, 1].
        """
        with interpolated(self.model, self._frozen, share):
            yield

    # -- what it knows -----------------------------------------------------------------------

    @torch.inference_mode()
    def classify(self, queries: Sequence[str], verbalizer_ids: Sequence[Sequence[int]]) -> Tensor:
        """Class probabilities by the verbalizers (Eq. 1): ``p(y|x) = P(V(y)|M(x))``, normalised.

        For a verbalizer of several tokens P is the product over its tokens.

        Args:
            queries: M(x) of each text.
            verbalizer_ids: tokens of V(y) for each label.

        Returns:
            ``(texts, labels)``, rows sum to 1.
        """
        first = torch.tensor([ids[0] for ids in verbalizer_ids], device=self.device)
        several = any(len(ids) > 1 for ids in verbalizer_ids)
        order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
        scores = torch.zeros(len(queries), len(verbalizer_ids))
        for start in range(0, len(order), SCORING_BATCH):
            rows = order[start : start + SCORING_BATCH]
            encoded = [self.encode(queries[i]) for i in rows]
            if several:
                scores[rows] = self._verbalizer_logps(encoded, verbalizer_ids)
            else:
                # the normaliser over the vocabulary is the same for all labels, so it is left out
                ids, attention = self._pad(encoded)
                output = self._causal().base_model(input_ids=ids, attention_mask=attention, use_cache=False)
                last = output.last_hidden_state[torch.arange(len(rows)), attention.sum(dim=1) - 1]
                scores[rows] = (last.float() @ self._head()[first].float().T).cpu()
        return label_probabilities(scores)  # Eq. 1

    def shorten(self, text: str, tokens: int) -> str:
        """The beginning of a text, at most so many tokens of it."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= tokens else str(self.tokenizer.decode(ids[:tokens]))

    def _verbalizer_logps(self, queries: list[list[int]], verbalizer_ids: Sequence[Sequence[int]]) -> Tensor:
        """``log P(V(y)|M(x))``, ``(texts, labels)``; the head meets the verbalizer's tokens and not the query's."""
        columns = []
        for verbalizer in verbalizer_ids:
            ids, attention = self._pad([[*query, *verbalizer] for query in queries])
            hidden = self._hidden(self._causal().base_model, ids, attention)
            first = torch.tensor([len(query) - 1 for query in queries], device=self.device)
            places = first.unsqueeze(1) + torch.arange(len(verbalizer), device=self.device)
            asked = hidden[torch.arange(len(queries), device=self.device).unsqueeze(1), places].flatten(0, 1)
            targets = torch.tensor(verbalizer, device=self.device).repeat(len(queries))
            columns.append(head_logps(asked, self._head(), targets).view(len(queries), -1).sum(dim=1))
        return torch.stack(columns, dim=1).cpu()

    @torch.inference_mode()
    def perplexity(self, text: str, max_tokens: int, advance: Callable[[float], None] = lambda _: None) -> float:
        """``exp`` of the mean negative log-likelihood of a token.

        The text is cut into windows of 256 tokens (fewer if the model reads fewer), each read after
        a beginning-of-sequence token (where the model has one) and nothing else; every token counts
        once. What looks like a special token in the text (the Penn Treebank is full of ``<unk>``) is read as the
        characters that it is written with: such a token has never been trained.

        Args:
            text: as it is.
            max_tokens: the first so many count.
            advance: told how many have been read since.

        Raises:
            ValueError: the text has no token that anything comes before.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[:max_tokens]
        bos = self.tokenizer.bos_token_id
        size = min(PERPLEXITY_WINDOW, self._causal().config.max_position_embeddings - 1)
        windows = [ids[start : start + size] for start in range(0, len(ids), size)]
        if windows and bos is None and len(windows[-1]) == 1:
            windows.pop()  # nothing comes before its only token
        if not windows:
            raise ValueError("the text has no token that could be predicted")
        total, count = 0.0, 0
        for start in range(0, len(windows), 4):
            batch = [window if bos is None else [bos, *window] for window in windows[start : start + 4]]
            logps, mask = self.logps(batch)
            total, count = total - float(logps.sum()), count + int(mask.sum())
            advance(sum(map(len, windows[start : start + 4])))
        return float(torch.tensor(total / count).exp())

    # -- inside ------------------------------------------------------------------------------

    def _causal(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _head(self) -> Tensor:
        return head_weight(self._causal())

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The original model, theta_old."""
        if self._frozen is not None:
            yield self._frozen
        else:
            with self.model.disable_adapter():
                yield self._causal()

    def _pad(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both ``(batch, tokens)``, padded on the right."""
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            attention[row, : len(sequence)] = 1
        return ids.to(self.device), attention.to(self.device)

    def _hidden(self, backbone: Any, ids: Tensor, attention: Tensor) -> Tensor:
        """Hidden states that predict the next token, ``(batch, tokens - 1, hidden)``."""
        output = backbone(input_ids=ids, attention_mask=attention, use_cache=False)
        hidden: Tensor = output.last_hidden_state[:, :-1]
        return hidden


def _unflatten(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
