"""What uploads under DP-SGD cost: Opacus's accountant over all of them, and the least noise that keeps to the budget.

What each upload was made with stands in its own metadata. From there it is added up, so settings or rows that change
between uploads change what the next one may cost, and never what the earlier ones did.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from scipy.optimize import brentq

from crosslm.config import FitConfig, PrivacyConfig
from crosslm.errors import ConfigError
from crosslm.privacy.bounds import PREFIX

MOST_NOISE, CLOSE = 2.0**19, 0.01  # of the search for the least noise multiplier, as in Opacus's own, but for rounding


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
        """Epsilon of so many uploads of this kind together."""
        return epsilon_of((self,) * uploads, delta)

    def told(self) -> dict[str, float]:
        """As the metadata of the upload has it."""
        return {f"{PREFIX}{name}": float(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Spent:
    """What the uploads so far were made with."""

    uploads: tuple[Mechanism, ...] = ()
    count_epsilon: float = 0.0
    """What noisy class counts have cost, once for all uploads."""

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, float]]) -> "Spent":
        """What the metadata of the earlier uploads says.

        Raises:
            ConfigError: one of them was made without DP-SGD, so there is no bound of all together.
        """
        for number, told in enumerate(metrics, start=1):
            if f"{PREFIX}noise_multiplier" not in told:
                raise ConfigError(
                    f"upload {number} of this client was made without privacy.epsilon, so no epsilon bounds all "
                    "uploads together; set privacy.epsilon before the first upload, in a new run or from a new kit, "
                    "or leave it out"
                )
        uploads = tuple(
            Mechanism(
                told[f"{PREFIX}noise_multiplier"],
                told[f"{PREFIX}sample_rate"],
                int(told[f"{PREFIX}steps"]),
                int(told.get(f"{PREFIX}means", 1)),  # where it is not told there may have been one
            )
            for told in metrics
        )
        return cls(uploads, max((told.get(f"{PREFIX}count_epsilon", 0.0) for told in metrics), default=0.0))


def epsilon_of(uploads: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of these uploads together, by Opacus's Renyi accountant (Mironov 2017; Mironov et al. 2019).

    Opacus's tighter accountant, PRV, fails where every row is in every batch.
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if not uploads:
        return 0.0
    total: Any = 0.0
    for one, times in Counter(uploads).items():
        total = total + one.steps * times * _step_cost(one.noise_multiplier, one.sample_rate)
        if one.means:
            total = total + one.means * times * _step_cost(one.noise_multiplier, 1.0)
    with quiet():
        return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)[0])


@lru_cache(maxsize=256)  # half a second
def _step_cost(noise_multiplier: float, sample_rate: float) -> Any:
    """Renyi divergence of one step at each of the accountant's orders; those of several steps are added."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)


def require_opacus() -> None:
    """Find out that Opacus is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise ConfigError("privacy.epsilon needs Opacus: pip install 'crosslm[privacy]'") from error


def check_budget(rows: int, fit: FitConfig, privacy: PrivacyConfig, uploads: int, who: str) -> str | None:
    """Find out that some noise keeps so many uploads within the budget, if there is one, without looking for the least.

    Args:
        rows: private rows.
        fit: how a client trains.
        privacy: the budget; there is none without ``epsilon``.
        uploads: how often the client trains and uploads in all.
        who: has the rows.

    Returns:
        What is doubtful of ``privacy.delta``, if anything is.

    Raises:
        ConfigError: no noise is enough, delta means nothing with so few rows, or Opacus is not installed.
    """
    doubt = privacy.check_delta(rows, who)
    if privacy.epsilon is None or not rows:
        return doubt
    require_opacus()
    least = _mechanism(MOST_NOISE, rows, fit, privacy).epsilon(privacy.delta, uploads)
    if least > privacy.epsilon_of_training:
        raise _too_little(who, privacy, privacy.epsilon_of_training, least)
    return doubt


def _mechanism(noise: float, rows: int, fit: FitConfig, privacy: PrivacyConfig) -> Mechanism:
    """One upload with this noise."""
    steps = fit.epochs * -(-rows // fit.batch_size)
    return Mechanism(noise, min(1.0, fit.batch_size / rows), steps, int(privacy.center))


def _too_little(who: str, privacy: PrivacyConfig, budget: float, least: float) -> ConfigError:
    return ConfigError(
        f"{who}: privacy.epsilon = {privacy.epsilon} cannot be kept: {budget:g} of it is for training, and with "
        f"privacy.delta = {privacy.delta:g} no noise brings that below {least:.3g}; raise privacy.epsilon"
    )


def plan(rows: int, fit: FitConfig, privacy: PrivacyConfig, uploads: int, spent: Spent | None = None) -> Mechanism:
    """The least noise with which so many uploads stay within the budget, those made already as they were made.

    Args:
        rows: private rows.
        fit: ``epochs`` and ``batch_size``, the expected size of a batch.
        privacy: the budget; the part for noisy class counts is taken off first.
        uploads: how often the client trains and uploads in all.
        spent: what the uploads made already cost.

    Raises:
        ConfigError: no noise is enough, nothing of the budget is left, or delta means nothing with so few rows.
    """
    privacy.check_delta(rows, "the client")
    spent = spent or Spent()
    budget = (privacy.epsilon or 0.0) - (spent.count_epsilon or privacy.epsilon_of_counts)
    like = _mechanism(0.0, rows, fit, privacy)
    left = uploads - len(spent.uploads)
    if spent.uploads:
        again = replace(like, noise_multiplier=spent.uploads[-1].noise_multiplier)
        if 0 <= budget - epsilon_of((*spent.uploads, *(again,) * left), privacy.delta) <= CLOSE:
            return again
        used = epsilon_of(spent.uploads, privacy.delta)
        if budget - used <= CLOSE:
            raise ConfigError(
                f"privacy.epsilon = {privacy.epsilon} is spent: the {len(spent.uploads)} upload(s) so far cost "
                f"{used:.2f} of the {budget:g} for training; no more may be trained with it; raise privacy.epsilon "
                "if you agree to that bound"
            )
    noise = _noise_multiplier(budget, privacy.delta, like, left, spent.uploads)
    if noise is None:
        most = replace(like, noise_multiplier=MOST_NOISE)
        least = epsilon_of((*spent.uploads, *(most,) * left), privacy.delta)
        raise _too_little("the client", privacy, budget, least)
    return replace(like, noise_multiplier=noise)


@cache  # a search of seconds, the same for each upload
def _noise_multiplier(
    epsilon: float, delta: float, like: Mechanism, uploads: int, earlier: tuple[Mechanism, ...]
) -> float | None:
    """The least noise of the uploads to come within the budget, to a hundredth of epsilon; None: none is enough."""

    def spent(noise: float) -> float:
        return epsilon_of((*earlier, *(replace(like, noise_multiplier=noise),) * uploads), delta)

    def excess(noise: float) -> float:
        """Above the middle of what is near enough; 0 anywhere there, which ends the search."""
        over = spent(noise) - epsilon
        return 0.0 if -CLOSE <= over <= 0 else over + CLOSE / 2

    high = 1.0
    while spent(high) > epsilon:
        high *= 2
        if high > MOST_NOISE:
            return None
    low = high / 2
    while spent(low) <= epsilon:
        low, high = low / 2, low
    noise = float(brentq(excess, low, high, xtol=1e-12))
    return noise if spent(noise) <= epsilon else high  # never above the budget, wherever the search ends


@contextmanager
def quiet() -> Iterator[None]:
    """What Opacus warns of in passing: a looser bound at the range's end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        yield
