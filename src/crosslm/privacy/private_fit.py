"""Training a classifier with differential privacy: DP-SGD (its accounting needs the extra ``crosslm[privacy]``).

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

import numpy as np
import torch
from torch import Tensor

from crosslm.config import FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError
from crosslm.models.slm import SLM
from crosslm.privacy.accounting import Mechanism, Spent, epsilon_of, plan, require_opacus
from crosslm.privacy.private_layers import body_read_once, frozen_below
from crosslm.privacy.private_mean import centred, noisy_mean
from crosslm.privacy.private_noise import fresh_generator, gaussian


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
            ModelError: the classifier's layers cannot be told apart (``trained_layers``), or it is damaged
                (``center``).
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

    A batch of no rows is noise alone, as the accountant counts on.
    """
    rows = slm.encode(examples.texts)
    optimizer, schedule = slm.optimizer(config, len(rows))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    deviation, expected_batch = mechanism.noise_multiplier * clip, mechanism.sample_rate * len(rows)
    slm.model.eval()  # no dropout: the noise is enough of that
    with body_read_once(slm, rows):
        for _ in range(mechanism.steps):
            drawn = [row for row in range(len(rows)) if secret.random() < mechanism.sample_rate]
            sums = [torch.zeros_like(parameter) for parameter in trained]
            for row in drawn:
                _add_clipped_gradient(sums, trained, slm.losses([rows[row]], [examples.labels[row]]).sum(), clip)
            _add_noise(sums, deviation, expected_batch, fresh_generator(secret))
            for parameter, gradient in zip(trained, sums, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_rows(len(drawn))


def _add_clipped_gradient(sums: Sequence[Tensor], trained: Sequence[Tensor], loss: Tensor, clip: float) -> None:
    """Add the gradient of one row's loss, scaled down to a norm of ``clip`` if it is longer.

    The row went through the model alone. Beside others its outputs would differ by rounding, with their number and
    length, and weights that came back can be such that they differ by as much as is wished. Then one row more would
    change the gradients of all, and by more than they are clipped to.

    A row whose gradient is not finite counts as zero: clipping cannot mend that, zero times infinity is no number, and
    one such row would show in all of the upload. The weights that came back decide which rows have such gradients, so a
    server could ask for a row in that way.
    """
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    if not norm.isfinite():
        return
    share = (clip / norm).clamp(max=1)
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total.add_(gradient * share)


def _add_noise(sums: Sequence[Tensor], deviation: float, expected_batch: float, noise: np.random.Generator) -> None:
    """``(sum of clipped gradients + deviation * N(0, I)) / expected_batch`` in the place of the sums."""
    for total in sums:
        total.add_(gaussian(noise, total), alpha=deviation).div_(expected_batch)
