"""Diversity (Eq. 10): ours against sentence-transformers' mining, and alone on large pools.

The vectors are those of the demo's real sentences and, to make more of them, of mixtures of two sentences and noise.
Checked: on the same vectors both find the same nearest neighbour similarity, to 1e-5; for a million vectors, which are
searched approximately, recall is measured on a thousand of them against the exact answer, and is 0.99 at least.
"""

import time

import torch
from generation import demo_config
from measure import agree, arguments, finish, in_turn, peak_memory, peak_of, ratio, spread
from sentence_transformers import util

from crosslm.algorithm.selection import approximate_diversity, diversity
from crosslm.data.split import load_split
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.sources import cache_folder, model_folder


def vectors(count: int, device: str) -> torch.Tensor:
    """``(count, 384)``."""
    config = demo_config(False)
    split = load_split(config)
    texts = sorted({text for part in [*split.private.values(), split.test, split.judge] for text in part.texts})
    real = SentenceEncoder(model_folder(config.selection.encoder, cache_folder()), device).encode(texts).cpu()
    generator = torch.Generator().manual_seed(0)
    made = torch.empty(count, real.shape[1])
    for part in made.split(50_000):
        first, second = (real[torch.randint(len(real), (len(part),), generator=generator)] for _ in range(2))
        share = torch.rand(len(part), 1, generator=generator)
        part.copy_(first * share + second * (1 - share) + 0.02 * torch.randn(part.shape, generator=generator))
    return torch.nn.functional.normalize(made, dim=1).to(device)


def mined(points: torch.Tensor) -> torch.Tensor:
    """Diversity by sentence-transformers: each vector's best hit but itself."""
    hits = util.semantic_search(points, points, top_k=2)
    best = [next(hit["score"] for hit in found if hit["corpus_id"] != row) for row, found in enumerate(hits)]
    return 1 - torch.tensor(best)


def recall(points: torch.Tensor, found: torch.Tensor, sample: int = 1000) -> float:
    """Share of a sample whose nearest neighbour, or one as near, was found."""
    rows = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:sample].to(points.device)
    best = torch.full((len(rows),), -1.0, device=points.device)
    for start in range(0, len(points), 50_000):
        similarity = points[rows] @ points[start : start + 50_000].T
        columns = torch.arange(start, start + similarity.shape[1], device=points.device)
        similarity[rows.unsqueeze(1) == columns.unsqueeze(0)] = -1.0
        best = torch.maximum(best, similarity.amax(dim=1))
    return float(((found[rows] - (1 - best)).abs() < 1e-5).float().mean())


def timed(function: object, points: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds, and the answer."""
    started = time.perf_counter()
    answer = function(points)
    if points.is_cuda:
        torch.cuda.synchronize()
    return round(time.perf_counter() - started, 2), answer


def main() -> None:
    """Measure 20,000 against the peer, then 100,000 and a million alone."""
    options = arguments(__doc__, memory={"type": int, "help": "only this many vectors once; print the peak memory"})
    if options.memory:
        points = vectors(options.memory, "cpu")
        (diversity if options.memory <= 100_000 else approximate_diversity)(points)
        print(peak_memory())
        return
    small, large, huge = (2_000, 5_000, 20_000) if options.quick else (20_000, 100_000, 1_000_000)
    points = vectors(small, options.device)
    answers: dict[str, torch.Tensor] = {}

    def ours() -> None:
        answers["ours"] = diversity(points)

    def theirs() -> None:
        answers["st"] = mined(points)

    seconds = in_turn({"st": theirs, "ours": ours}, 1 if options.quick else 5)
    difference = float((answers["ours"].cpu() - answers["st"]).abs().max())
    seconds_large, _ = timed(diversity, vectors(large, options.device))
    many = vectors(huge, options.device)
    seconds_huge, found = timed(approximate_diversity, many)
    figures = {
        "ratio_vs_st": ratio(seconds["st"], seconds["ours"]),
        "seconds_100k": seconds_large,
        "seconds_1m": seconds_huge,
        "recall_1m": recall(many, found),
        "sizes": [small, large, huge],
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "largest_difference": difference,
    }
    if options.device == "cpu":
        sizes = (small, 2 * small) if options.quick else (50_000, 100_000, 500_000, 1_000_000)
        figures["peak_bytes"] = {str(size): peak_of(__file__, "--memory", str(size)) for size in sizes}
    agree({"diversity": (difference, 1e-5), "share of neighbours not found": (1 - figures["recall_1m"], 0.01)})
    finish("selection", figures, options)


if __name__ == "__main__":
    main()
