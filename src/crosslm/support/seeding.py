"""A seed from (run seed, role, id, step), so that no random state is ever stored."""

import hashlib


def seed_for(run_seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) that depends on the run's seed and on what it is for.

    The same arguments give the same seed on every machine and Python version; any other
    argument gives an unrelated one (SHA-256).
    """
    key = "/".join([str(run_seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
