"""A client's classifier: an ``AutoModelForSequenceClassification`` of the types in ``architecture.MODEL_TYPES``."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from crosslm.config import Config, FitConfig, SLMSpec
from crosslm.data.examples import Examples
from crosslm.models.architecture import output_layer, travelling
from crosslm.models.batches import batches, hold_out
from crosslm.models.dtypes import fit_dtype
from crosslm.models.pretrained import (
    agree_on_padding,
    pretrained_classifier,
    tokenizer_files,
    tokens_read,
    travelled_classifier,
)
from crosslm.records import SlmState

HEAD_SPREAD = 0.02  # of the weights of a new output layer, as transformers has it for BERT
FLOAT32_ONLY = {"deberta"}  # whose masks are float32's least number, which bfloat16 cannot hold
PREDICTION_BATCH = 64
Of = TypeVar("Of")


class SLM:
    """A sequence classifier with its tokenizer and its label names."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self._outputs = list(range(len(self.labels)))  # which output each of the labels is
        self.model.eval()

    @classmethod
    def load(
        cls,
        folder: str,
        labels: Sequence[str],
        max_length: int,
        seed: int,
        num_hidden_layers: int | None = None,
        freeze_embeddings: bool = False,
        device: str = "cpu",
        pooling: str | None = None,
    ) -> "SLM":
        """A pretrained body with a new head whose first values come from the seed.

        A folder that is a classifier already keeps its head if that has as many outputs as there are labels; otherwise
        it gets a new one, which is logged once.

        Args:
            folder: model folder or hub id.
            labels: class names; a folder that is a classifier of these already keeps its head and the order of its
                outputs.
            max_length: tokens of a text that are read.
            seed: of the new head.
            num_hidden_layers: keep only the lowest layers.
            freeze_embeddings: do not train the word embeddings.
            device: where the weights go.
            pooling: ``mean`` puts a layer on top that takes the mean of the tokens.

        Raises:
            ModelError: it cannot be loaded as a sequence classifier, has fewer layers, cannot have that pooling, or
                would have nothing of a text left at ``max_length``.
        """
        model, tokenizer = pretrained_classifier(folder, labels, seed, num_hidden_layers, pooling)
        outputs = [model.config.id2label[place] for place in range(len(labels))]
        slm = cls(model.to(device), tokenizer, outputs, tokens_read(model, tokenizer, max_length, folder))
        slm.order_labels(labels)
        slm.freeze_embeddings(freeze_embeddings)
        return slm

    @classmethod
    def of_spec(cls, folder: str, spec: SLMSpec, config: Config, seed: int) -> "SLM":
        """The classifier that a run's configuration describes, before any training.

        Args:
            folder: where the weights of ``spec.model`` are.
            spec: its architecture.
            config: of the run: labels, ``slm.max_length``, ``slm.freeze_embeddings``, device.
            seed: of the new head.

        Raises:
            ModelError: as :meth:`load` does.
        """
        layers, frozen = spec.num_hidden_layers, config.slm.freeze_embeddings
        return cls.load(
            folder, config.task.labels, config.slm.max_length, seed, layers, frozen, config.device, spec.pooling
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def order_labels(self, labels: Sequence[str]) -> None:
        """Speak of the labels in this order from now on; the model's outputs stay in theirs.

        Raises:
            ValueError: they are not this classifier's labels.
        """
        if sorted(labels) != sorted(self.labels):
            raise ValueError(f"its labels are {list(self.labels)}, not {list(labels)}")
        self._outputs = [self._outputs[self.labels.index(label)] for label in labels]
        self.labels = tuple(labels)

    def freeze_embeddings(self, frozen: bool) -> None:
        """Whether training leaves the word embeddings as they are."""
        self.model.get_input_embeddings().requires_grad_(not frozen)

    def fit(
        self,
        examples: Examples,
        config: FitConfig,
        seed: int,
        on_rows: Callable[[float], None] = lambda _: None,
        targets: Tensor | None = None,
        canaries: int = 0,
        split: tuple[list[int], list[int]] | None = None,
    ) -> dict[str, float]:
        """Train by cross-entropy (step 1 on private text, step 5 on synthetic text).

        Fixed epochs, or with ``config.patience`` until the loss on held-out rows has not fallen
        for so many epochs; then the best epoch's weights are taken.

        Args:
            examples: rows to learn from; labels are indices into ``self.labels``.
            config: how.
            seed: of the order of rows, the held-out rows and dropout.
            on_rows: told how many rows were trained on.
            targets: ``(rows, labels)``, probabilities to learn instead of the labels.
            canaries: the last so many rows are never held out.
            split: places of the rows to train on and of those that are held out, where they are not to be drawn.

        Returns:
            ``loss`` of the last epoch, ``epochs`` run and, with patience, ``holdout_loss`` and
            ``holdout_accuracy`` of the weights that were taken.
        """
        generator = torch.Generator().manual_seed(seed)
        share = config.holdout_fraction if config.patience else 0.0
        drawn = hold_out(len(examples), share, generator, canaries)
        trained, held_out = split or drawn
        training, holdout = examples.take(trained), examples.take(held_out)
        rows = self.encode(training.texts)
        wanted = torch.tensor(training.labels) if targets is None else targets[trained]
        optimizer, schedule = self.optimizer(config, len(rows))
        metrics: dict[str, float] = {}
        best: dict[str, Tensor] | None = None
        waited = 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for epoch in range(config.epochs):
                loss = self._epoch(rows, wanted, config, generator, optimizer, schedule, on_rows)
                metrics |= {"loss": loss, "epochs": float(epoch + 1)}
                if not held_out:
                    continue
                holdout_loss, accuracy = self._holdout(holdout, None if targets is None else targets[held_out])
                if holdout_loss < metrics.get("holdout_loss", torch.inf):
                    metrics |= {"holdout_loss": holdout_loss, "holdout_accuracy": accuracy}
                    best, waited = copy.deepcopy(self.model.state_dict()), 0
                else:
                    waited += 1
                if waited >= config.patience:
                    break
        if best is not None:
            self.model.load_state_dict(best)
        self.model.zero_grad()  # as large as the model
        self.model.eval()
        return metrics

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values())

    def new_head(self, seed: int) -> None:
        """Put an output layer that tells nothing yet in the place of the one that there is; all below it stays."""
        outputs = output_layer(self.model)
        first = HEAD_SPREAD * torch.randn(outputs.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            outputs.weight.copy_(first)
            if outputs.bias is not None:
                outputs.bias.zero_()

    def interpolate(self, earlier: Mapping[str, Tensor], share: float) -> None:
        """Move the weights back towards earlier ones: ``share * now + (1 - share) * earlier``.

        Wortsman et al., "Robust fine-tuning of zero-shot models", 2022.

        Args:
            earlier: weights of the same model by name, as in :class:`SlmState`.
            share: of the weights as they are now, in (0, 1].
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.lerp_(earlier[name].to(parameter), 1 - share)

    @torch.inference_mode()
    def predict_proba(self, texts: Sequence[str], on_rows: Callable[[float], None] = lambda _: None) -> Tensor:
        """``S(.|x)`` of each text: ``(texts, labels)``, rows sum to 1, on the CPU.

        Args:
            texts: to classify.
            on_rows: told of each batch's number of texts.
        """
        self.model.eval()
        rows = self.encode(texts)
        probabilities = torch.zeros(len(rows), len(self.labels))
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), PREDICTION_BATCH):
            batch = order[start : start + PREDICTION_BATCH]
            logits = self.logits([rows[row] for row in batch])
            probabilities[batch] = logits.float().softmax(dim=1).cpu()
            on_rows(len(batch))
        return probabilities[:, self._outputs]

    def accuracy(self, examples: Examples) -> float:
        """Share of rows whose most likely class is their label."""
        predicted = self.predict_proba(examples.texts).argmax(dim=1)
        return float((predicted == torch.tensor(examples.labels)).float().mean())

    # -- what training is made of ------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, cut at ``max_length``."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return rows

    def losses(self, rows: list[list[int]], labels: Sequence[int] | Tensor) -> Tensor:
        """Cross-entropy of each encoded row with its label, or with probabilities ``(rows, labels)``: ``(rows,)``."""
        wanted, outputs = torch.as_tensor(labels), torch.tensor(self._outputs)
        target = outputs[wanted] if wanted.ndim == 1 else torch.zeros_like(wanted).index_copy(1, outputs, wanted)
        return cross_entropy(self.logits(rows).float(), target.to(self.device), reduction="none")

    def logits(self, rows: Sequence[list[int]]) -> Tensor:
        """The model's outputs for encoded rows, in the model's own order: ``(rows, labels)``."""
        logits: Tensor = self.model(**self._pad(rows)).logits
        return logits

    def optimizer(self, config: FitConfig, rows: int) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW over what is trained, and its schedule over ``config.epochs`` of so many rows."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        fused = self.device.type in ("cpu", "cuda")  # the whole step in one kernel
        decay = config.weight_decay
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=decay, fused=fused)
        steps = config.epochs * -(-rows // config.batch_size)
        return optimizer, get_linear_schedule_with_warmup(optimizer, round(config.warmup_fraction * steps), steps)

    # -- as a value that travels, and as a folder --------------------------------------------

    def by_output(self, of_labels: Sequence[Of]) -> tuple[Of, ...]:
        """What belongs to each of ``labels``, in the order of the model's outputs, which :meth:`to_state` has."""
        return tuple(of_labels[self._outputs.index(output)] for output in range(len(self.labels)))

    def to_state(self) -> SlmState:
        """Everything another process needs to use it: architecture, tokenizer, labels, weights."""
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.model.state_dict().items()}
        labels = self.by_output(self.labels)
        architecture = travelling(json.loads(self.model.config.to_json_string()), labels)
        tokenizer = tokenizer_files(self.tokenizer, self.max_length)
        return SlmState(architecture, tokenizer, labels, self.max_length, weights)

    @classmethod
    def from_state(cls, state: SlmState, labels: Sequence[str], device: str = "cpu") -> "SLM":
        """The classifier that :meth:`to_state` took apart. No code comes with it.

        Args:
            state: of it.
            labels: its labels in the order in which it is to speak of them, as for :meth:`order_labels`.
            device: for the weights.

        Raises:
            UploadError: the architecture is unknown, or the weights do not fit it.
            ValueError: its labels are others.
        """
        model, tokenizer = travelled_classifier(state)
        slm = cls(model.to(device), tokenizer, state.labels, state.max_length)
        slm.order_labels(labels)
        return slm

    def save(self, folder: str) -> None:
        """Write a folder that ``AutoModelForSequenceClassification.from_pretrained`` loads."""
        self.model.save_pretrained(folder)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load_trained(cls, folder: str, device: str = "cpu") -> "SLM":
        """Load what :meth:`save` wrote."""
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        agree_on_padding(model, tokenizer)
        labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        return cls(model.to(device), tokenizer, labels, tokenizer.model_max_length)

    # -- inside ------------------------------------------------------------------------------

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        longest = max(1, *map(len, rows))  # a text without a letter has no token, where the tokenizer adds none
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _epoch(
        self,
        rows: list[list[int]],
        targets: Tensor,
        config: FitConfig,
        generator: torch.Generator,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        on_rows: Callable[[float], None],
    ) -> float:
        self.model.train()
        total, device = 0.0, self.device.type
        is_fast = fit_dtype(config, device) == torch.bfloat16 and self.model.config.model_type not in FLOAT32_ONLY
        for batch in batches(rows, config.batch_size, generator):
            with torch.autocast(device, torch.bfloat16, enabled=is_fast):
                loss = self.losses([rows[row] for row in batch], targets[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
            on_rows(len(batch))
        self.model.eval()
        return total / len(rows)

    def _holdout(self, examples: Examples, targets: Tensor | None) -> tuple[float, float]:
        """Cross-entropy with what is learned, the labels or probabilities, and the share whose label is found."""
        probabilities = self.predict_proba(examples.texts)
        labels = torch.tensor(examples.labels)
        wanted = one_hot(labels, len(self.labels)).float() if targets is None else targets
        loss = float(-(wanted * probabilities.clamp_min(1e-9).log()).sum(dim=1).mean())
        return loss, float((probabilities.argmax(dim=1) == labels).float().mean())
