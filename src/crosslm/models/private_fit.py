"""Training a classifier with differential privacy: DP-SGD through Opacus (the extra ``crosslm[privacy]``).

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016. Each row enters a batch by a coin of its own
(Poisson sampling), its gradient is clipped to a norm of ``clip``, and Gaussian noise of standard deviation
``noise_multiplier * clip`` is added to the sum. What leaves, after any number of steps, is (epsilon, delta)-
differentially private towards adding or removing one row.

The coins and the noise come from the operating system's entropy and never from the run's seed: the server knows
that seed, and noise that can be drawn again can be taken off again. So a private run cannot be repeated to the bit.
PyTorch's generator takes 32 bits of a seed on the CPU, few enough to try them all; therefore each step has a new one.
"""

import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from crosslm.config import FitConfig, PrivacyConfig
from crosslm.errors import ConfigError, ModelError
from crosslm.models.private_mean import centred, noisy_mean
from crosslm.models.slm import SLM
from crosslm.records import Examples

ACCOUNTANT = "rdp"  # Renyi; Opacus's tighter PRV accountant fails where every row is in every batch
MOST_NOISE, CLOSE = 1e6, 0.01  # of the search for the least noise multiplier, as in Opacus's own
MICRO_BATCH = 16  # rows whose gradients are in memory at once; changes no result
LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
EMBEDDINGS = re.compile(r"embed|\bwte\b|\bwpe\b")


@dataclass(frozen=True)
class Mechanism:
    """The subsampled Gaussian mechanism, applied ``steps`` times for one upload."""

    noise_multiplier: float
    sample_rate: float
    """Probability of a row to be in a batch."""
    steps: int
    means: int = 0
    """Noisy means of all rows, each with the same noise."""

    def epsilon(self, delta: float, uploads: int = 1) -> float:
        """Epsilon of so many uploads together, by Opacus's accountant (Mironov 2017; Mironov et al. 2019)."""
        from opacus.accountants import create_accountant

        accountant = create_accountant(mechanism=ACCOUNTANT)
        accountant.history = [(self.noise_multiplier, self.sample_rate, self.steps * uploads)]
        if self.means:
            accountant.history.append((self.noise_multiplier, 1.0, self.means * uploads))
        with _quiet():
            return float(accountant.get_epsilon(delta))


def require_opacus() -> None:
    """Find out that Opacus is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise ConfigError("privacy.epsilon needs Opacus: pip install 'crosslm[privacy]'") from error


def plan(rows: int, fit: FitConfig, privacy: PrivacyConfig, uploads: int) -> Mechanism:
    """The least noise with which so many uploads stay within the budget.

    Args:
        rows: private rows.
        fit: ``epochs`` and ``batch_size``, the expected size of a batch.
        privacy: the budget; the part for noisy class counts is taken off first.
        uploads: how often the client trains and uploads in all.

    Raises:
        ConfigError: no noise is enough, or there is no budget.
    """
    rate = min(1.0, fit.batch_size / rows)
    steps, means = fit.epochs * -(-rows // fit.batch_size), int(privacy.center)
    noise = _noise_multiplier(privacy.epsilon_of_training, privacy.delta, rate, steps, means, uploads)
    if noise is None:
        raise ConfigError(
            f"privacy.epsilon = {privacy.epsilon} cannot be kept over {steps * uploads} steps of {rows} rows: "
            "raise it, or lower slm.private.epochs"
        )
    return Mechanism(noise, rate, steps, means)


@cache  # a search of seconds, the same for each upload
def _noise_multiplier(epsilon: float, delta: float, rate: float, steps: int, means: int, uploads: int) -> float | None:
    """The least noise within the budget, to a hundredth of epsilon; None where none is enough."""

    def spent(noise: float) -> float:
        return Mechanism(noise, rate, steps, means).epsilon(delta, uploads)

    low, high = 0.0, 10.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            return None
    while epsilon - spent(high) > CLOSE:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


class PrivateTraining:
    """A silo's budget, and the training that keeps to it. It lives as long as the silo's client does."""

    def __init__(self, privacy: PrivacyConfig, uploads: int, secret: random.Random | None = None) -> None:
        """Set up, with the secret drawn from the operating system.

        Args:
            privacy: the budget for all uploads together.
            uploads: how many there will be.
            secret: draws coins and noise, in place of a new one: for measurements that must be repeatable. It is no
                secret then.

        Raises:
            ConfigError: Opacus is not installed.
        """
        require_opacus()
        self.privacy, self.uploads = privacy, uploads
        self._secret = secret or random.SystemRandom()
        self._made = 0
        self._counts: tuple[int, ...] | None = None

    def fit(
        self, slm: SLM, examples: Examples, config: FitConfig, seed: int, on_rows: Callable[[float], None]
    ) -> dict[str, float]:
        """Train by DP-SGD for the next upload.

        Fixed epochs on all rows: ``config.patience`` is not heeded, since stopping by private rows would tell of them;
        nor is the training loss told, which does so too.

        Args:
            slm: is trained in place.
            examples: the private rows.
            config: learning rate, epochs, expected batch size.
            seed: of what the model draws itself, which is nothing where its only randomness is dropout: that is off.
            on_rows: told how many rows were trained on, those of a batch in one go.

        Returns:
            ``epochs`` and, with the prefix ``dp/``, the bound of all uploads so far and what it was computed from.

        Raises:
            ConfigError: the budget is spent.
            ModelError: the classifier has parameters that have no gradient of each row.
        """
        if self._made >= self.uploads:
            raise ConfigError(
                f"the privacy budget was set for {self.uploads} upload(s) and is spent; no more leave this silo"
            )
        mechanism = plan(len(examples), config, self.privacy, self.uploads)
        self._made += 1  # counted before it is used: what is not uploaded is not given back
        with torch.random.fork_rng(), frozen_below(slm, self.privacy.trained_layers):
            torch.manual_seed(seed)
            with self._centred(slm, examples, mechanism):
                dp_sgd(slm, examples, config, mechanism, self.privacy.clip, self._secret, on_rows)
        spent = mechanism.epsilon(self.privacy.delta, self._made)
        return {
            "epochs": float(config.epochs),
            "dp/epsilon": spent + self.privacy.epsilon_of_counts,
            "dp/delta": self.privacy.delta,
            "dp/clip": self.privacy.clip,
            "dp/noise_multiplier": mechanism.noise_multiplier,
            "dp/sample_rate": mechanism.sample_rate,
            "dp/steps": float(mechanism.steps * self._made),
        }

    @contextmanager
    def _centred(self, slm: SLM, examples: Examples, mechanism: Mechanism) -> Iterator[None]:
        """As ``privacy.center`` says."""
        if not mechanism.means:
            yield
            return
        noise = torch.Generator(slm.device).manual_seed(self._secret.getrandbits(63))
        with centred(slm, noisy_mean(slm, slm.encode(examples.texts), mechanism.noise_multiplier, noise)):
            yield

    def go_on(self, made: int, told: tuple[int, ...] | None) -> None:
        """Count the uploads that were made before this process began; the counts that were told then are told again."""
        self._made, self._counts = made, told

    def class_counts(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """What is told of the rows of each label: nothing (zeros), noisy numbers, or the exact ones.

        Noisy numbers carry discrete Laplace noise (Ghosh et al. 2009) of ``privacy.count_epsilon``; one row is in one
        count, so all of them cost that once. They are drawn once and told again at each upload.
        """
        if self.privacy.class_counts == "hidden":
            return (0,) * len(counts)
        if self.privacy.class_counts == "noisy":
            if self._counts is None:
                noise = discrete_laplace(len(counts), self.privacy.epsilon_of_counts, self._secret)
                self._counts = tuple(max(0, count + shift) for count, shift in zip(counts, noise, strict=True))
            return self._counts
        return counts


def discrete_laplace(count: int, epsilon: float, draw: random.Random) -> list[int]:
    """Integers k with ``P(k) ~ exp(-epsilon |k|)``: the difference of two geometric draws."""

    def geometric() -> int:
        return math.floor(math.log(1 - draw.random()) / -epsilon)

    return [geometric() - geometric() for _ in range(count)]


def dp_sgd(
    slm: SLM,
    examples: Examples,
    config: FitConfig,
    mechanism: Mechanism,
    clip: float,
    secret: random.Random,
    on_rows: Callable[[float], None],
) -> None:
    """So many steps of DP-SGD; what is frozen stays so.

    Raises:
        ModelError: a trained parameter has no gradient of each row.
    """
    from opacus.optimizers import DPOptimizer

    rows = slm.encode(examples.texts)
    optimizer, schedule = slm.optimizer(config, len(rows))
    noise = torch.Generator(slm.device)
    optimizer = DPOptimizer(
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=clip,
        expected_batch_size=mechanism.sample_rate * len(rows),
        generator=noise,
    )
    slm.model.eval()  # no dropout: the noise is enough of that
    for module in slm.model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.train()  # Opacus looks at these alone
    with _gradients_of_each_row(slm.model):
        for _ in range(mechanism.steps):
            drawn = [row for row in range(len(rows)) if secret.random() < mechanism.sample_rate]
            batch = sorted(drawn, key=lambda row: len(rows[row]))
            noise.manual_seed(secret.getrandbits(63))
            _step(slm, [rows[row] for row in batch], [examples.labels[row] for row in batch], optimizer)
            schedule.step()
            on_rows(len(batch))
    slm.model.eval()


def _step(slm: SLM, rows: list[list[int]], labels: list[int], optimizer: Any) -> None:
    """One step, in pieces that fit the memory; a batch of no rows is noise alone, as the accountant counts on."""
    for start in range(0, max(len(rows), 1), MICRO_BATCH):
        piece = slice(start, start + MICRO_BATCH)
        optimizer.zero_grad(set_to_none=True)
        if rows:
            slm.losses(rows[piece], labels[piece]).sum().backward()
            _check_gradients(slm.model, len(rows[piece]))
        else:
            for parameter in optimizer.params:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
        optimizer.signal_skip_step(start + MICRO_BATCH < len(rows))
        optimizer.step()


def _check_gradients(model: nn.Module, rows: int) -> None:
    """A parameter that sees the batch as one row would be clipped wrongly, without a word."""
    for name, parameter in model.named_parameters():
        sample = getattr(parameter, "grad_sample", None)
        if parameter.requires_grad and (not isinstance(sample, Tensor) or len(sample) != rows):
            raise ModelError(
                f"{name} has no gradient of each row, so the classifier cannot be trained with privacy.epsilon; "
                "set privacy.trained_layers to train fewer layers, or choose another model"
            )


@contextmanager
def _gradients_of_each_row(model: nn.Module) -> Iterator[None]:
    """Opacus's hooks on the model, and no trace of them afterwards.

    Position embeddings are looked up once for the whole batch and would get one gradient for all rows; here they are
    looked up for each row.
    """
    from opacus.grad_sample import GradSampleHooks

    size = [0]

    def note_size(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        size[0] = len(inputs["input_ids"])

    def for_each_row(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        ids, *more = inputs
        return (ids.expand(size[0], *ids.shape[1:]), *more) if len(ids) == 1 else None

    handles = [model.register_forward_pre_hook(note_size, with_kwargs=True)]
    handles += [
        module.register_forward_pre_hook(for_each_row) for module in model.modules() if isinstance(module, nn.Embedding)
    ]
    try:
        hooks = GradSampleHooks(model, loss_reduction="sum")
    except NotImplementedError as error:
        raise ModelError(
            f"the classifier cannot be trained with privacy.epsilon: {str(error)[:100]}; choose another of slm.models"
        ) from error
    try:
        with _quiet():
            yield
    finally:
        hooks.cleanup()
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_below(slm: SLM, layers: int | None) -> Iterator[None]:
    """Train only the highest layers and what lies above them; 0: only the new head; None: what is trained anyhow.

    Noise grows with the number of trained parameters, so fewer of them often learn more.

    Raises:
        ModelError: the model's layers cannot be told apart.
    """
    trained = {name: parameter for name, parameter in slm.model.named_parameters() if parameter.requires_grad}
    if layers is not None:
        body = f"{slm.model.base_model_prefix}."
        numbers = {name: int(found.group(1)) for name in trained if (found := LAYER.search(name))}
        if not numbers or not any(name.startswith(body) for name in trained):
            raise ModelError(
                "privacy.trained_layers: this classifier's layers have no numbers to tell them apart by; "
                "leave trained_layers out, or choose another of slm.models"
            )
        lowest = max(numbers.values()) - layers + 1
        for name, parameter in trained.items():
            above = layers > 0 and name not in numbers and not EMBEDDINGS.search(name)
            keep = not name.startswith(body) or above or numbers.get(name, -1) >= lowest
            parameter.requires_grad_(keep)
    try:
        yield
    finally:
        for parameter in trained.values():
            parameter.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """What Opacus and its hooks warn of in passing: inputs without gradients, and a looser bound at the range's end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        yield
