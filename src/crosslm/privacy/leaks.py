"""The silo's own look at the texts that trained what comes back, before it takes it (step 5)."""

from collections.abc import Sequence

from crosslm.algorithm.overlap import longest_shared, nearest_similarity
from crosslm.config import PrivacyConfig
from crosslm.errors import LeakError
from crosslm.models.encoder import Encoder


class LeakCheck:
    """Compares synthetic texts with private ones. No private word is in what it says: that may be logged elsewhere.

    That it refuses is told to the server all the same, so there is none under DP (``NO_LEAK_CHECK``).
    """

    def __init__(self, private: Sequence[str], limits: PrivacyConfig, encoder: Encoder) -> None:
        self._private = list(private)
        self._limits = limits
        self._encoder = encoder

    def check(self, texts: Sequence[str]) -> None:
        """Let pass texts that are no nearer to private ones than ``privacy`` allows.

        Args:
            texts: the synthetic texts that the server says it trained the SLM on.

        Raises:
            LeakError: a text is nearer, or no texts were sent along.
        """
        if not texts:
            raise LeakError(
                "no texts came with the SLM, so privacy.max_shared_words and max_similarity cannot be kept; either the "
                "server chose none, and the SLM has learned nothing, or privacy must be set there too, to send them"
            )
        words, similarity = self._limits.max_shared_words, self._limits.max_similarity
        if words is not None:
            shared = longest_shared(texts, self._private)
            if max(shared) > words:
                above = sum(length > words for length in shared)
                raise LeakError(
                    f"{above} of {len(texts)} synthetic texts share more than {words} words in a row with a private "
                    f"text, at most {max(shared)} (privacy.max_shared_words); the SLM is not taken back; "
                    "look at what the LLM writes, or raise the bound"
                )
        if similarity is not None:
            near = nearest_similarity(self._encoder.encode(texts), self._encoder.encode(self._private))
            if float(near.max()) > similarity:
                raise LeakError(
                    f"{int((near > similarity).sum())} of {len(texts)} synthetic texts have a similarity above "
                    f"{similarity} to a private text, at most {float(near.max()):.3f} (privacy.max_similarity); "
                    "the SLM is not taken back; look at what the LLM writes, or raise the bound"
                )
