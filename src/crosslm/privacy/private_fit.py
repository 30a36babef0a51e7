"""Training a classifier with differential privacy: DP-SGD through Opacus (the extra ``crosslm[privacy]``).

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016. Each row enters a batch by a coin of its own
(Poisson sampling), its gradient is clipped to a norm of ``clip``, and Gaussian noise of standard deviation
``noise_multiplier * clip`` is added to the sum. What leaves, after any number of steps, is (epsilon, delta)-
differentially private towards adding or removing one row, as it is accounted; the number of rows counts as known.

The coins and the noise come from the operating system's entropy and never from the run's seed: the server knows
that seed, and noise that can be drawn again can be taken off again. So a private run cannot be repeated to the bit.
Each coin is drawn from that entropy itself; each step's noise has a fresh key of 128 bits from it (``private_noise``).
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosslm.config import FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, ModelError
from crosslm.models.slm import SLM
from crosslm.privacy.accounting import Mechanism, Spent, epsilon_of, plan, quiet, require_opacus
from crosslm.privacy.private_layers import frozen_below
from crosslm.privacy.private_mean import centred, noisy_mean
from crosslm.privacy.private_noise import fresh_generator, gaussian

MICRO_BATCH = 16  # rows whose gradients are in memory at once; changes no result


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
        self._earlier: tuple[Mapping[str, float], ...] = ()
        self._made: tuple[Mechanism, ...] = ()
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
            ``epochs`` and, with the prefix ``dp/``, the bound of all uploads so far, this one's noise, sampling rate,
            steps and means, and what noisy class counts cost.

        Raises:
            ConfigError: the budget is spent, or an earlier upload was made without one.
            ModelError: the classifier has parameters that have no gradient of each row.
        """
        spent = self._spent()
        if len(spent.uploads) >= self.uploads:
            raise ConfigError(
                f"the privacy budget was set for {self.uploads} upload(s) and is spent; no more leave this silo"
            )
        mechanism = plan(len(examples), config, self.privacy, self.uploads, spent)
        self._made += (mechanism,)  # counted before it is used: what is not uploaded is not given back
        with torch.random.fork_rng(), frozen_below(slm, self.privacy.trained_layers):
            torch.manual_seed(seed)
            with self._centred(slm, examples, mechanism):
                dp_sgd(slm, examples, config, mechanism, self.privacy.clip, self._secret, on_rows)
        count_epsilon = spent.count_epsilon or self.privacy.epsilon_of_counts
        return {
            "epochs": float(config.epochs),
            "dp/epsilon": epsilon_of((*spent.uploads, mechanism), self.privacy.delta) + count_epsilon,
            "dp/delta": self.privacy.delta,
            "dp/clip": self.privacy.clip,
            "dp/count_epsilon": count_epsilon,
            **mechanism.told(),
        }

    def _spent(self) -> Spent:
        """By the uploads of earlier processes and of this one, those included that failed here."""
        earlier = Spent.of(self._earlier)
        return replace(earlier, uploads=earlier.uploads + self._made)

    @contextmanager
    def _centred(self, slm: SLM, examples: Examples, mechanism: Mechanism) -> Iterator[None]:
        """As ``privacy.center`` says."""
        if not mechanism.means:
            yield
            return
        noise, rows = fresh_generator(self._secret), slm.encode(examples.texts)
        with centred(slm, noisy_mean(slm, rows, mechanism.noise_multiplier, noise)):
            yield

    def go_on(self, metrics: Sequence[Mapping[str, float]], told: tuple[int, ...] | None) -> None:
        """Count the uploads that were made before this process began, by their metadata.

        Args:
            metrics: of each of them.
            told: the class counts that they told; noisy ones are told again.
        """
        self._earlier, self._made = tuple(metrics), ()
        self._counts = told if any(one.get("dp/count_epsilon") for one in metrics) else None

    def class_counts(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """What is told of the rows of each label: nothing (zeros), noisy numbers, or the exact ones.

        Noisy numbers carry discrete Laplace noise (Ghosh et al. 2009) of ``privacy.count_epsilon``; one row is in one
        count, so all of them cost that once. They are drawn once and told again at each upload.
        """
        if self.privacy.told_counts == "hidden":
            return (0,) * len(counts)
        if self.privacy.told_counts == "noisy":
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
    # Opacus clips and sums; its own noise is by PyTorch's generator, so here it adds none
    optimizer = DPOptimizer(
        optimizer, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=None, loss_reduction="sum"
    )
    deviation, expected_batch = mechanism.noise_multiplier * clip, mechanism.sample_rate * len(rows)
    optimizer.attach_step_hook(
        lambda summed: _add_noise(
            [parameter.grad for parameter in summed.params], deviation, expected_batch, fresh_generator(secret)
        )
    )
    slm.model.eval()  # no dropout: the noise is enough of that
    for module in slm.model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.train()  # Opacus looks at these alone
    with _gradients_of_each_row(slm.model):
        for _ in range(mechanism.steps):
            drawn = [row for row in range(len(rows)) if secret.random() < mechanism.sample_rate]
            batch = sorted(drawn, key=lambda row: len(rows[row]))
            _step(slm, [rows[row] for row in batch], [examples.labels[row] for row in batch], optimizer)
            schedule.step()
            on_rows(len(batch))
    slm.model.eval()


def _add_noise(sums: Sequence[Tensor], deviation: float, expected_batch: float, noise: np.random.Generator) -> None:
    """``(sum of clipped gradients + deviation * N(0, I)) / expected_batch`` in the place of the sums."""
    for total in sums:
        total.add_(gaussian(noise, total), alpha=deviation).div_(expected_batch)


def _step(slm: SLM, rows: list[list[int]], labels: list[int], optimizer: Any) -> None:
    """One step, in pieces that fit the memory; a batch of no rows is noise alone, as the accountant counts on."""
    for start in range(0, max(len(rows), 1), MICRO_BATCH):
        piece = slice(start, start + MICRO_BATCH)
        optimizer.zero_grad(set_to_none=True)
        if rows:
            slm.losses(rows[piece], labels[piece]).sum().backward()
            _check_gradients(slm.model, len(rows[piece]))
            _leave_out_what_is_not_finite([parameter.grad_sample for parameter in optimizer.params])
        else:
            for parameter in optimizer.params:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
        optimizer.signal_skip_step(start + MICRO_BATCH < len(rows))
        optimizer.step()


def _leave_out_what_is_not_finite(samples: list[Tensor]) -> None:
    """Zero the gradients of rows that have an infinite one or none at all.

    Clipping cannot mend them, zero times infinity is no number, and one such row would show in all of the upload. The
    weights that came back decide which rows have such gradients, so a server could ask for a row in that way.
    """
    norms = torch.stack([torch.linalg.vector_norm(sample.flatten(1), dim=1) for sample in samples])
    rows = ~norms.isfinite().all(dim=0)
    for sample in samples:
        sample[rows] = 0.0


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
    except (NotImplementedError, AttributeError) as error:
        raise _untrainable(error) from error
    try:
        with quiet():
            yield
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise _untrainable(error) from error  # of layers that Opacus has no gradients of rows for, each fails its way
    finally:
        hooks.cleanup()
        for handle in handles:
            handle.remove()


def _untrainable(error: Exception) -> ModelError:
    return ModelError(
        f"the classifier cannot be trained with privacy.epsilon: {type(error).__name__}: {str(error)[:100]}; set "
        "privacy.trained_layers = 0 to train its head alone, or choose another of slm.models"
    )
