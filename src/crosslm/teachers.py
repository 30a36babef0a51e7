"""Whose judgement a text is given by: the arriving SLM alone, as in the paper, or several SLMs together (ours).

With ``reward.teachers`` above 1 the probability S(y|x) of Eq. 4 is the mean over the arriving SLM and the last
uploads of other clients that were served before it. What one silo's classifier knows then reaches the LLM and the
others' classifiers in each arrival: the averaging of Lin et al., "Ensemble Distillation for Robust Model Fusion in
Federated Learning", NeurIPS 2020, on texts that the LLM wrote.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from crosslm.algorithm.rewards import correct_prior
from crosslm.config import RewardConfig
from crosslm.errors import UploadError
from crosslm.models.slm import SLM
from crosslm.records import Upload
from crosslm.support.progress import Advance

logger = logging.getLogger(__name__)

KNOWN = 5
"""What the LLM learns from, an SLM's pool, the original LLM's, what judges are weighed by, what all learn last."""


@dataclass
class Teacher:
    """An SLM as it was uploaded, from a client that was served."""

    upload: Upload
    slm: SLM
    kept_as: str = ""
    """The name of its bytes in the checkpoints, once it is there."""
    read: Callable[[tuple[str, ...]], Tensor] = field(init=False, repr=False)
    """What :func:`stranger_proba` gives for it; of the last few texts it is known, since all read the same ones for
    each client: what the original LLM wrote (Data-free KD), and what all learn last."""

    def __post_init__(self) -> None:
        slm = self.slm
        self.read = lru_cache(maxsize=KNOWN)(lambda texts: stranger_proba(slm, list(texts)))

    def is_of(self, upload: Upload) -> bool:
        """Whether it came in this very upload."""
        return self.upload is upload or (
            self.upload.client_round == upload.client_round
            and self.upload.slm.weights.keys() == upload.slm.weights.keys()
            and all(torch.equal(value, upload.slm.weights[name]) for name, value in self.upload.slm.weights.items())
        )


class Teachers:
    """The SLMs of the clients served so far, the latest last, as many as may judge beside an arriving one."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.members: dict[str, Teacher] = {}

    def readings(self, upload: Upload, texts: int) -> int:
        """How many texts are read where so many are judged: each by the arriving SLM and by all who judge beside it."""
        return texts * (1 + len(self._beside(upload)))

    def probabilities(self, slm: SLM, upload: Upload, texts: list[str], advance: Advance = lambda _: None) -> Tensor:
        """S(.|x) of Eq. 4 for each text: the mean over the arriving SLM and the other clients' last ones.

        Args:
            slm: the arriving one.
            upload: what it came in.
            texts: to judge.
            advance: told of what was read since, of as many as :meth:`readings` says.

        Returns:
            ``(texts, labels)``, rows sum to 1.

        Raises:
            UploadError: the arriving SLM fails on a text. Another one that does is left out from then on.
        """
        known = self.members.get(upload.client_id)
        if known and known.is_of(upload):
            found = known.read(tuple(texts))
            advance(len(texts))
        else:
            found = stranger_proba(slm, texts, advance)
        own = as_rewarding(slm, found, upload, self.config)
        return torch.stack([own, *self._opinions_of_others(upload, texts, advance)]).mean(dim=0)

    def of_others(self, slm: SLM, upload: Upload, texts: list[str], advance: Advance = lambda _: None) -> Tensor | None:
        """The same by the other clients' SLMs alone, for one that may not judge; None where there are none.

        Raises:
            UploadError: the arriving SLM fails on a text, as it would in its training.
        """
        stranger_proba(slm, texts, advance)
        opinions = self._opinions_of_others(upload, texts, advance)
        return torch.stack(opinions).mean(dim=0) if opinions else None

    def _beside(self, upload: Upload) -> list[str]:
        """The other clients whose SLMs judge, the latest last."""
        others = [name for name in self.members if name != upload.client_id]
        return others[max(0, len(others) - self.config.teachers + 1) :]

    def _opinions_of_others(self, upload: Upload, texts: list[str], advance: Advance) -> list[Tensor]:
        opinions = []
        for name in self._beside(upload):
            member = self.members[name]
            try:
                found = member.read(tuple(texts))
            except UploadError as error:
                logger.warning("the SLM of client %s judges no more: %s", name, error)
                del self.members[name]
                continue
            advance(len(texts))
            opinions.append(as_rewarding(member.slm, found, member.upload, self.config))
        return opinions

    def accepted(self, upload: Upload, slm: SLM) -> None:
        """Remember an SLM that was served, as it was uploaded.

        Args:
            upload: what it came in.
            slm: it, rebuilt from the upload; is kept.
        """
        if self.config.teachers == 1:
            return
        self.members.pop(upload.client_id, None)  # the latest is the last
        self.members[upload.client_id] = Teacher(_of_one_copy(upload, slm), slm)
        for name in list(self.members)[: -self.config.teachers]:
            del self.members[name]

    def forget(self, clients: Iterable[str]) -> None:
        """Have these clients' SLMs judge no more."""
        for name in list(clients):
            self.members.pop(name, None)


def _of_one_copy(upload: Upload, slm: SLM) -> Upload:
    """An upload whose weights are an SLM's own that was rebuilt from it: both stay, and may be large.

    They stay two where they are not the same, in half precision on the wire or on a GPU.
    """
    own = slm.model.state_dict()
    weights = {
        name: own[name] if (own[name].dtype, own[name].device) == (value.dtype, value.device) else value
        for name, value in upload.slm.weights.items()
    }
    return replace(upload, slm=replace(upload.slm, weights=weights))


def stranger_proba(slm: SLM, texts: list[str], advance: Advance = lambda _: None) -> Tensor:
    """``S(.|x)`` of each text by an SLM that came from elsewhere, ``(texts, labels)``.

    Raises:
        UploadError: it fails on a text, or gives what is no probability.
    """
    try:
        probabilities = slm.predict_proba(texts, advance)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust library is no Exception
        raise UploadError(f"the SLM cannot classify: {type(error).__name__}: {str(error)[:120]}") from error
    if not probabilities.isfinite().all():
        raise UploadError("the SLM gives probabilities that are not finite")
    return probabilities


def as_rewarding(slm: SLM, probabilities: Tensor, upload: Upload, config: RewardConfig) -> Tensor:
    """The probabilities that rewards are made of: with ``reward.correct_prior`` freed of the training shares."""
    if not config.correct_prior:
        return probabilities
    return correct_prior(probabilities, torch.tensor(upload.counts_of(slm.labels)))
